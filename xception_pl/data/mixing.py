"""Mixup, CutMix and random erasing for a batch on its device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xception_pl.data.draws import beta, uniform


def mix(image: Tensor, target: Tensor, seed: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix each image with its partner, the image at the mirrored place of the batch: i with B − 1 − i.

    The share is drawn for each pair, from both seeds, so both images of a pair know it. With both alphas above 0 a
    pair takes mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) with equal chance, as in timm. In a batch of odd
    size the middle image stays as it is. The partner comes from the same device's batch: unlike all other changes,
    mixing depends on how the global batch is split over devices and accumulated batches.

    Args:
        image: (B, C, H, W) float.
        target: (B, K) float.
        seed: (B,) int64.
        mixup: alpha of mixup's Beta distribution, 0 is off.
        cutmix: alpha of CutMix's Beta distribution, 0 is off; its share is corrected to the area really pasted.
    """
    pair = seed + seed.flip(0)
    partner = image.flip(0)
    height, width = image.shape[2:]
    share = torch.ones(len(image), device=image.device)
    mixed = image
    if mixup > 0:
        share = beta(pair, "mixup", mixup).float()
        mixed = torch.lerp(partner, image, share.view(-1, 1, 1, 1))
    if cutmix > 0:
        u = uniform(pair, "cutmix", 3)
        side = (1 - beta(pair, "cutmix", cutmix)).sqrt().float()
        top, bottom = _cut(u[:, 0], side, height)
        left, right = _cut(u[:, 1], side, width)
        pasted = torch.where(_inside(top, left, bottom, right, height, width), partner, image)
        kept = 1 - (bottom - top) * (right - left) / (height * width)
        chosen = u[:, 2] < (0.5 if mixup > 0 else 1.0)
        mixed = torch.where(chosen.view(-1, 1, 1, 1), pasted, mixed)
        share = torch.where(chosen, kept, share)
    return mixed, torch.lerp(target.flip(0), target, share[:, None])


def soft_target(label: Tensor, num_classes: int | None) -> Tensor:
    """Label indices (B,) as one-hot (B, K) float32; multi-hot labels (B, K) as float32."""
    if label.ndim == 2:
        return label.to(torch.float32)
    if num_classes is None:
        raise ValueError(
            "mixing labels that are class indices needs the number of classes: DeviceAugment(num_classes=…)"
        )
    return F.one_hot(label, num_classes).to(torch.float32)


def erase(image: Tensor, seed: Tensor, probability: float) -> Tensor:
    """Set a random rectangle to 0, mid-grey in [-1, 1], with `probability` (Zhong et al., 2020; ranges as in timm).

    Area 2 % to 33 % of the image, log of the aspect ratio uniform between 0.3 and 1 / 0.3; of ten drawn shapes the
    first that is smaller than the image is taken, and if none is, the image stays.
    """
    attempts = 10
    height, width = image.shape[2:]
    u = uniform(seed, "erase", 2 * attempts + 3)
    area = (0.02 + u[:, :attempts] * (1 / 3 - 0.02)) * (height * width)
    log_aspect = (2 * u[:, attempts : 2 * attempts] - 1) * 1.2039728  # log(1 / 0.3)
    tall, wide = (area * log_aspect.exp()).sqrt().round(), (area / log_aspect.exp()).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    tall, wide = tall.gather(1, first).squeeze(1), wide.gather(1, first).squeeze(1)
    top = (u[:, -3] * (height - tall + 1)).floor()
    left = (u[:, -2] * (width - wide + 1)).floor()
    inside = _inside(top, left, top + tall, left + wide, height, width)
    erased = inside & (fits.any(1) & (u[:, -1] < probability)).view(-1, 1, 1, 1)
    return torch.where(erased, 0, image)


def _cut(centre: Tensor, side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and past-the-last pixel of a cut of `side` (share of the size) around `centre`, clipped to the image."""
    half = (side * size).floor() // 2
    middle = (centre * size).floor()
    return (middle - half).clamp(0, size), (middle + half).clamp(0, size)


def _inside(top: Tensor, left: Tensor, bottom: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Mask (B, 1, H, W) of each image's rectangle."""
    y = torch.arange(height, device=top.device)
    x = torch.arange(width, device=top.device)
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return rows[:, None, :, None] & columns[:, None, None, :]
