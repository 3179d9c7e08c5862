"""Global pooling by timm's names (`SelectAdaptivePool2d`). Figure 5 has `avg`, the mean."""

import torch
from torch import Tensor

POOLS = ("avg", "max", "avgmax", "catavgmax")


def global_pooling(x: Tensor, kind: str) -> Tensor:
    """(B, C, H, W) to (B, C): the mean, the largest, or half of each; `catavgmax` to (B, 2 C), one after the other; "" leaves x."""
    if kind == "":
        return x
    if kind == "avg":
        return x.mean((2, 3))
    if kind == "max":
        return x.amax((2, 3))
    mean, largest = x.mean((2, 3)), x.amax((2, 3))
    return torch.cat((mean, largest), dim=1) if kind == "catavgmax" else 0.5 * (mean + largest)
