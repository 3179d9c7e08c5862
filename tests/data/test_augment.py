"""The device's changes of a batch against their definitions."""

import torch

from xception_pl.data.augment import DeviceAugment
from xception_pl.data.config import DataConfig


def test_scaling_is_exact_and_keeps_the_memory_format() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    image = image.contiguous(memory_format=torch.channels_last)
    out = DeviceAugment(DataConfig())({"image": image, "label": torch.tensor([1, 2])}, training=False)
    assert out["image"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out["image"], image.double().div(127.5).sub(1).float(), rtol=0, atol=1e-7)
    assert out["image"].amin() == -1
    assert out["image"].amax() == 1
