"""RandAugment (Cubuk et al., 2020) for a batch on its device: every image with its own operations.

A batch cannot branch by image, so an operation is written as one of three general steps with parameters for each image,
and an image that drew another operation passes through with parameters that change nothing:

- a **table** of 256 values a channel: AutoContrast, Equalize, Solarize, Posterize;
- a **blend** with a degenerate image: Brightness, Color, Contrast, Sharpness;
- an **affine** map: Rotate, ShearX, ShearY, TranslateX, TranslateY.

Values are whole numbers from 0 to 255 after each step, as in Pillow, whose operations these are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from xception_pl.data.draws import uniform

OPERATIONS = (
    "Identity", "AutoContrast", "Equalize", "Rotate", "Solarize", "Color", "Posterize", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
"""The paper's list, each drawn with equal chance and always applied (timm adds two and skips half)."""

# Strengths at magnitude 10; all grow with the magnitude. The sign of the last two rows is drawn.
POSTERIZE_BITS = 4  # bits taken away
ENHANCE = 0.9  # factor 1 ± this
ROTATE_DEGREES, SHEAR, TRANSLATE = 30.0, 0.3, 0.45  # translation as a share of the side
FILL = 128.0  # what an affine map brings in from outside: mid-grey


def randaugment(image: Tensor, seed: Tensor, operations: int, magnitude: float) -> Tensor:
    """Apply `operations` random operations of `magnitude` (0 to 10) to each image.

    Args:
        image: (B, 3, H, W) float of whole numbers from 0 to 255; so is the result.
        seed: (B,) int64.
    """
    for layer in range(operations):
        u = uniform(seed, f"randaugment/{layer}", 2)
        drawn = (u[:, 0] * len(OPERATIONS)).long()
        image = apply_operation(image, drawn, torch.where(u[:, 1] < 0.5, -1.0, 1.0), magnitude)
    return image


def apply_operation(image: Tensor, drawn: Tensor, sign: Tensor, magnitude: float) -> Tensor:
    """Apply to each image the operation `drawn` (B,), an index of `OPERATIONS`, with `sign` (B,) of ±1."""
    is_op = {name: drawn == index for index, name in enumerate(OPERATIONS)}
    image = _table_step(image, is_op, magnitude)
    image = _blend_step(image, is_op, 1 + sign * ENHANCE * magnitude / 10)
    return _affine_step(image, is_op, sign * magnitude / 10)


def _table_step(image: Tensor, is_op: dict[str, Tensor], magnitude: float) -> Tensor:
    batch, channels, height, width = image.shape
    index = image.long().flatten(2)  # (B, C, H·W)
    count = torch.zeros(batch, channels, 256, device=image.device).scatter_add_(
        2, index, torch.ones((), device=image.device).expand(index.shape)
    )
    grey = torch.arange(256, device=image.device, dtype=torch.float32).expand(batch, channels, 256)
    bits = round(POSTERIZE_BITS * magnitude / 10)
    tables = {
        "AutoContrast": _autocontrast_table(count, grey),
        "Equalize": _equalize_table(count, grey),
        "Solarize": torch.where(grey < 256 * (1 - magnitude / 10), grey, 255 - grey),
        "Posterize": (grey / 2**bits).floor() * 2**bits,
    }
    table = grey
    for name, values in tables.items():
        table = torch.where(is_op[name].view(-1, 1, 1), values, table)
    return table.gather(2, index).view(batch, channels, height, width)


def _autocontrast_table(count: Tensor, grey: Tensor) -> Tensor:
    """Stretch the values in use to 0–255 (Pillow's `ImageOps.autocontrast` without a cutoff)."""
    used = count > 0
    low = used.to(torch.uint8).argmax(2, keepdim=True)
    high = 255 - used.flip(2).to(torch.uint8).argmax(2, keepdim=True)
    scale = 255 / (high - low).to(torch.float64)  # float64: truncation must agree with Pillow's
    stretched = ((grey - low) * scale).floor().clamp(0, 255).to(torch.float32)
    return torch.where(high > low, stretched, grey)


def _equalize_table(count: Tensor, grey: Tensor) -> Tensor:
    """Flatten the histogram (Pillow's `ImageOps.equalize`, whose integer arithmetic float32 holds exactly)."""
    last = count.gather(2, 255 - (count > 0).flip(2).to(torch.uint8).argmax(2, keepdim=True))
    step = ((count.sum(2, keepdim=True) - last) / 255).floor()
    before = count.cumsum(2) - count
    flattened = ((step / 2).floor() + before).div(step.clamp_min(1)).floor().clamp(0, 255)
    return torch.where((step > 0) & ((count > 0).sum(2, keepdim=True) > 1), flattened, grey)


def _blend_step(image: Tensor, is_op: dict[str, Tensor], factor: Tensor) -> Tensor:
    red, green, blue = image.unbind(1)
    luma = ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor()[:, None]  # Pillow's convert("L")
    mean = (luma.mean((1, 2, 3), keepdim=True) + 0.5).floor()
    degenerate = image  # a blend with itself changes nothing
    for name, other in {
        "Brightness": torch.zeros_like(mean),
        "Color": luma,
        "Contrast": mean,
        "Sharpness": smooth(image),
    }.items():
        degenerate = torch.where(is_op[name].view(-1, 1, 1, 1), other, degenerate)
    return torch.lerp(degenerate, image, factor.view(-1, 1, 1, 1)).clamp_(0, 255).add_(1e-4).floor_()


def smooth(image: Tensor) -> Tensor:
    """Pillow's SMOOTH filter: a 3×3 mean whose centre counts five times; the border stays."""
    channels = image.shape[1]
    kernel = torch.ones(3, 3, device=image.device)
    kernel[1, 1] = 5
    kernel = (kernel / 13).expand(channels, 1, 3, 3)
    inner = (F.conv2d(image, kernel, groups=channels) + 0.5).floor()
    out = image.clone()
    out[:, :, 1:-1, 1:-1] = inner
    return out


def _affine_step(image: Tensor, is_op: dict[str, Tensor], strength: Tensor) -> Tensor:
    """Bilinear resampling; `strength` (B,) is the signed magnitude / 10. Angles and shears turn about the centre."""
    height, width = image.shape[2:]
    angle = torch.where(is_op["Rotate"], -strength * math.radians(ROTATE_DEGREES), 0)
    shear_x = torch.where(is_op["ShearX"], strength * SHEAR, 0)
    shear_y = torch.where(is_op["ShearY"], strength * SHEAR, 0)
    # From output to input, in pixels about the centre; grid_sample wants halves of the side.
    x_y = (angle.sin() + shear_x) * height / width
    y_x = (-angle.sin() + shear_y) * width / height
    move_x = torch.where(is_op["TranslateX"], strength * TRANSLATE * 2, 0)
    move_y = torch.where(is_op["TranslateY"], strength * TRANSLATE * 2, 0)
    rows = (angle.cos(), x_y, move_x, y_x, angle.cos(), move_y)
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    sampled = F.grid_sample(image - FILL, grid, "bilinear", "zeros", align_corners=False) + FILL
    return sampled.round_().clamp_(0, 255)
