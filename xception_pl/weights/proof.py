"""Whether an exported file computes what the network does: on random and on real images, of several sizes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import xception_pl

LARGEST_DIFFERENCE = 1e-4
"""Of the outputs, relative to the largest of them."""

_REAL_IMAGES = Path(xception_pl.__file__).with_name("data") / "sample" / "test.parquet"


@dataclass(frozen=True)
class Difference:
    """How far outputs are apart, relative to the largest output, and at which image size the worst was."""

    random: float
    real: float
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        sizes = ", ".join(f"{height} × {width}" for height, width in self.sizes)
        return f"largest relative difference {self.random:.1e} on random and {self.real:.1e} on real images of {sizes}"

    @property
    def largest(self) -> float:
        return max(self.random, self.real)


def proof_images(in_chans: int, size: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """Three random images, and two that ship with the package, scaled to [-1, 1]: ``(B, in_chans, *size)``."""
    yield "random", torch.rand(3, in_chans, *size, generator=torch.Generator().manual_seed(sum(size))) * 2 - 1
    rows = pq.read_table(_REAL_IMAGES, columns=["image"]).slice(0, 2).to_pylist()
    real = [np.asarray(Image.open(BytesIO(row["image"]["bytes"])).convert("L"), dtype=np.float32) for row in rows]
    images = torch.from_numpy(np.stack(real))[:, None].expand(-1, in_chans, -1, -1) / 127.5 - 1
    yield "real", F.interpolate(images, size, mode="bilinear").contiguous()


@torch.no_grad()
def difference(network: nn.Module, other: Callable[[Tensor], Tensor], in_chans: int, size: int) -> Difference:
    """Compares outputs at a size and at others, so that each side is odd once and even once.

    Args:
        network: in evaluation mode.
        other: images to what should be the same outputs.
        in_chans: channels of the images.
        size: pixels a side.
    """
    sizes = ((size, size), (size + 1, size), (size, size + 1))
    worst = {"random": 0.0, "real": 0.0}
    for height, width in sizes:
        for kind, images in proof_images(in_chans, (height, width)):
            expected, found = network(images), other(images)
            if found.shape != expected.shape or not bool(found.isfinite().all()):
                worst[kind] = torch.inf
                continue
            worst[kind] = max(worst[kind], ((found - expected).abs().max() / expected.abs().max()).item())
    return Difference(worst["random"], worst["real"], sizes)
