"""Changes of a whole batch on its device: scaling to [-1, 1] and, in training, what the recipe asks for.

Order: RandAugment on 0–255, TF-Slim's colours on [0, 1], scaling, random erasing, mixup or CutMix. Every draw is a
function of the image's own seed (of both seeds of a mixed pair), never of the batch's size or the device.
"""

import torch
from torch import Tensor

from xception_pl.data.color import distort_color
from xception_pl.data.config import DataConfig
from xception_pl.data.mixing import erase, mix, soft_target
from xception_pl.data.randaugment import randaugment


class DeviceAugment:
    """A batch of uint8 images in, the network's float32 input in [-1, 1] out.

    A batch is a dictionary of tensors on one device: `image` (B, C, S, S) uint8, `label` (B,) int64 or (B, K)
    multi-hot, `seed` (B,) int64, needed where anything is drawn. The result has the same entries, `image` as float32
    in the memory format it came in, and with mixup or CutMix in training also `target`, soft labels (B, K) float32.

    Args:
        config: what to do; all of it happens in training only, but for the scaling.
        num_classes: K, needed to mix labels that are class indices.
    """

    def __init__(self, config: DataConfig, num_classes: int | None = None) -> None:
        self.config = config
        self.num_classes = num_classes

    def __call__(self, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
        """The batch for the network.

        Raises:
            ValueError: colour or RandAugment without three channels, or mixing class indices without `num_classes`.
        """
        config = self.config
        stored = batch["image"]
        if not training:
            return {**batch, "image": to_unit_range(stored)}
        if (config.color != "none" or config.randaugment) and stored.shape[1] != 3:
            raise ValueError(
                f"data.color and data.randaugment need images of 3 channels, not {stored.shape[1]}: turn both off"
            )
        image = stored
        if config.randaugment:
            image = randaugment(image.float(), batch["seed"], config.randaugment, config.randaugment_magnitude)
        if config.color != "none":
            image = distort_color(image.float() / 255, batch["seed"], config.color) * 255
        image = to_unit_range(image)
        if config.random_erasing:
            image = erase(image, batch["seed"], config.random_erasing)
        extra = {}
        if config.mixup or config.cutmix:
            target = soft_target(batch["label"], self.num_classes)
            image, extra["target"] = mix(image, target, batch["seed"], config.mixup, config.cutmix)
        if stored.is_contiguous(memory_format=torch.channels_last):
            image = image.contiguous(memory_format=torch.channels_last)
        return {**batch, **extra, "image": image}


def to_unit_range(image: Tensor) -> Tensor:
    """x / 127.5 − 1 as float32, in one pass over memory on a GPU."""
    one = torch.ones((), device=image.device)
    return torch.addcdiv(-one, image, one * 127.5)
