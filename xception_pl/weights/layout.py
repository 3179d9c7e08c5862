"""How families of files name the tensors of an Xception and turn their axes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from xception_pl.nets.preprocessing import Preprocessing


@dataclass(frozen=True)
class Layout:
    """One family's manner, in both directions. Names of ours are those of `Xception.state_dict()`."""

    name: str
    """For messages: "timm's names"."""
    rename: Callable[[str], str]
    """Our name of a tensor to the family's."""
    to_file: Callable[[str, Tensor], Tensor]
    """Given our name: our tensor to the family's axes."""
    from_file: Callable[[str, Tensor], Tensor]
    """Given our name: the family's tensor to our axes."""
    numerics: Literal["keras", "torch"]
    preprocessing: Preprocessing


def unchanged(name: str, tensor: Tensor) -> Tensor:
    """A tensor whose axes are ours."""
    return tensor


OURS = Layout("our names", lambda name: name, unchanged, unchanged, "keras", Preprocessing())
