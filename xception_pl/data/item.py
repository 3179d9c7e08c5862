"""What a loader worker hands over: a batch, and what is to be told of its making."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from xception_pl.data.decode import Pixels
from xception_pl.data.device_decode import Undecoded

Batch = dict[str, Tensor]
Position = tuple[int, int]
"""(epoch, micro-batch within it) of a rank."""


@dataclass(frozen=True, slots=True)
class Corrupt:
    """An image that cannot be decoded."""

    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Item:
    """What a worker hands over."""

    batch: Batch
    corrupt: list[Corrupt]
    faults: dict[str, int]
    """Reads that failed and were tried again since the item before."""
    encoded: Tensor | None = None
    """Bytes of the images that are left to the device: `batch` has no "image" yet."""
    undecoded: tuple[Undecoded, ...] = ()
    cpu_images: tuple[Pixels, ...] = ()
    """The others, in the order of their places."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Each tensor that a worker hands over takes a file descriptor and a connection: more than its bytes, for small ones.
        small = {name: value.numpy() for name, value in self.batch.items() if name != "image"}
        return _handed_over, (
            self.batch.get("image"),
            small,
            *(getattr(self, field.name) for field in fields(self)[1:]),
        )

    def copied(self) -> "Item":
        """The same with images that the worker that made them does not write over."""
        return (
            replace(self, batch={**self.batch, "image": self.batch["image"].clone()}) if "image" in self.batch else self
        )

    def pin_memory(self) -> "Item":
        """The same in page-locked memory, from which copies to a GPU are fast: the loader looks for this method."""
        pinned = {name: value.pin_memory() for name, value in self.batch.items()}
        return replace(self, batch=pinned, encoded=None if self.encoded is None else self.encoded.pin_memory())


def _handed_over(image: Tensor | None, small: dict[str, npt.NDArray[Any]], *rest: Any) -> Item:
    batch = {name: torch.from_numpy(value) for name, value in small.items()}
    return Item(batch if image is None else {"image": image, **batch}, *rest)
