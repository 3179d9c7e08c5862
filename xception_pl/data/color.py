"""TF-Slim's colour distortion (its Inception preprocessing) for a batch, every image with its own draws and order.

The operations are TensorFlow's `tf.image.adjust_*` on floats: values may leave [0, 1] between them and are clipped
once, at the end.
"""

from typing import Literal

import torch
from torch import Tensor

from xception_pl.data.draws import uniform

BRIGHTNESS_MAX = 32 / 255
HUE_MAX = 0.2
FACTOR_MIN, FACTOR_MAX = 0.5, 1.5
"""Range of the saturation's and of the contrast's factor."""

ORDERS = ("BSHC", "SBCH", "CHBS", "HSCB")
"""TF-Slim's four orders of brightness, saturation, hue, contrast. Fast mode has one order: `BS`."""
_WALK = "BSBHSCHBS"
"""The shortest sequence that contains each of the four orders: a batch of mixed orders takes nine steps."""


def distort_color(image: Tensor, seed: Tensor, mode: Literal["fast", "full"]) -> Tensor:
    """Distort `image` (B, 3, H, W), float in [0, 1], by draws from `seed` (B,); the result is clipped to [0, 1]."""
    u = uniform(seed, "color", 5)
    amount = {
        "B": (2 * u[:, 0] - 1) * BRIGHTNESS_MAX,
        "S": FACTOR_MIN + u[:, 1] * (FACTOR_MAX - FACTOR_MIN),
        "H": (2 * u[:, 2] - 1) * HUE_MAX,
        "C": FACTOR_MIN + u[:, 3] * (FACTOR_MAX - FACTOR_MIN),
    }
    change = {"B": adjust_brightness, "S": adjust_saturation, "H": adjust_hue, "C": adjust_contrast}
    if mode == "fast":
        return adjust_saturation(adjust_brightness(image, amount["B"]), amount["S"]).clamp_(0, 1)
    order = (u[:, 4] * len(ORDERS)).long()
    done = torch.zeros_like(order)
    sequence = torch.tensor([[*map(ord, o), 0] for o in ORDERS], device=image.device)[order]
    for name in _WALK:
        now = sequence.gather(1, done[:, None]).squeeze(1) == ord(name)
        image = torch.where(now[:, None, None, None], change[name](image, amount[name]), image)
        done = done + now
    return image.clamp_(0, 1)


def adjust_brightness(image: Tensor, delta: Tensor) -> Tensor:
    """Add `delta` (B,) to `image` (B, C, H, W)."""
    return image + _per_image(delta)


def adjust_contrast(image: Tensor, factor: Tensor) -> Tensor:
    """Move `image` (B, C, H, W) away from each channel's mean by `factor` (B,)."""
    mean = image.mean((2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(image), image, _per_image(factor))


def adjust_saturation(image: Tensor, factor: Tensor) -> Tensor:
    """Multiply the saturation of `image` (B, 3, H, W) in HSV by `factor` (B,) and clip it to [0, 1].

    Value and hue stay, so each channel's distance from the value (the largest channel) scales by new / old saturation.
    A pixel whose value is not positive has no saturation and becomes grey, as in TensorFlow.
    """
    value, smallest = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    saturation = (value - smallest) / value
    ratio = (saturation * _per_image(factor)).clamp_max_(1) / saturation
    ratio = torch.where((value > 0) & (saturation > 0), ratio, 0)
    return value - (value - image) * ratio


def adjust_hue(image: Tensor, delta: Tensor) -> Tensor:
    """Turn the hue of `image` (B, 3, H, W) by `delta` (B,) of a full circle; largest and smallest channel stay."""
    value, smallest = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    chroma = value - smallest
    red, green, blue = image.unbind(1)
    is_red, is_green = red == value[:, 0], green == value[:, 0]
    safe = torch.where(chroma > 0, chroma, 1)[:, 0]
    sector = torch.where(
        is_red, (green - blue) / safe, torch.where(is_green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    turned = sector[:, None] + 6 * _per_image(delta)
    offsets = torch.tensor([5.0, 3.0, 1.0], device=image.device).view(1, 3, 1, 1)
    k = torch.remainder(turned + offsets, 6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def _per_image(number: Tensor) -> Tensor:
    return number.view(-1, 1, 1, 1)
