"""The fused layers' formulas in plain torch, for float64 and autograd, NHWC like the kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception_pl.kernels.ops import normalise


def error(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def bounds(dtype: torch.dtype) -> float:
    """What a kernel may differ from float64 on the same inputs: float32 sums, or one rounding of the result."""
    return {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def draw(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Values that are far from centred, as those of a network are."""
    return (torch.randn(*shape) + 0.5).to(dtype).to(device)


def norm_layer(channels: int, device: str) -> nn.BatchNorm2d:
    """A batch norm with scales of both signs, one of them 0."""
    layer = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01).to(device)
    layer.weight.data.normal_()
    layer.weight.data[channels // 2] = 0.0
    layer.bias.data.normal_()
    return layer


def normalised(y: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    """Batch norm in float64 of y (B, H, W, C), by the batch."""
    return nhwc(F.batch_norm(nchw(y), None, None, layer.weight.double(), layer.bias.double(), True, 0.0, layer.eps))


def table_of(y: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    """The forward table by the kernels, which test_normalise shows to be right."""
    return normalise.finish(normalise.statistics(y), layer)
