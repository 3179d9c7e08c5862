"""What a weight file holds, before a network is made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from xception_pl.nets.config import ModelConfig
from xception_pl.nets.preprocessing import Preprocessing
from xception_pl.optim.config import Loss

Results = dict[str, float | str]
"""What was measured with weights: `images`, `top1`, `top5`, `loss` …, and of `TEXTS` in words the images and their preparation."""
TEXTS = ("data", "prepared")


class WeightsError(ValueError):
    """A file of weights cannot be used. The message is for the user: which file, what is wrong, what to do."""


@dataclass
class Stored:
    """Tensors by the names that the file gives them, and what else the file tells.

    Reading one executes nothing and takes memory in proportion to the file. Shapes and values are not yet checked.
    """

    source: str
    """The path or id that the user gave, for messages."""
    kind: str
    """What the file is, for messages: "a Keras file"."""
    tensors: dict[str, Tensor]
    model: ModelConfig | None = None
    """The network, where the file describes one of ours."""
    preprocessing: Preprocessing | None = None
    class_names: list[str] | None = None
    loss: Loss = "cross_entropy"
    """What it was trained with, which says how logits become probabilities."""
    results: Results | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the `config.json` beside it says, of a repository that is not ours."""
    raw_tensors: dict[str, Tensor] | None = field(default=None, repr=False)
    """The last step's weights, where `tensors` are averaged ones kept beside them."""


def needs(*packages: str) -> None:
    """Refuses to go on without packages that only exports need.

    Raises:
        WeightsError: with the command that installs them.
    """
    absent = [name for name in packages if find_spec(name) is None]
    if absent:
        raise WeightsError(f"this export needs {' and '.join(absent)}: pip install 'xception_pl[export]'.")
