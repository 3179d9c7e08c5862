"""cpu.c's functions on tensors: float32, channels last, on the processor."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xception_pl.compiled import Unavailable, compiled
from xception_pl.kernels.memory import floats
from xception_pl.nets.convs import SeparableConv2d
from xception_pl.nets.xception import Block, Xception

SOURCE = Path(__file__).parent / "cpu.c"
FLAGS: tuple[str, ...] = ("-fopenmp",)
POINTS, DEPTHWISE, PATCHES, GRADIENT = range(4)
NO_FLOOR = float("-inf")


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Left(ctypes.Structure):
    """`struct left` of cpu.c."""

    _fields_ = [
        *_fields(ctypes.c_int, "kind batch height width channels out_height out_width stride padding dilation"),
        *_fields(ctypes.c_void_p, "input scale shift"),
        *_fields(ctypes.c_float, "floor"),
        *_fields(ctypes.c_void_p, "depthwise normed mean slope"),
    ]


class Right(ctypes.Structure):
    """`struct right` of cpu.c."""

    _fields_ = [
        *_fields(ctypes.c_int, "columns"),
        *_fields(ctypes.c_void_p, "packed out scale shift added"),
        *_fields(ctypes.c_float, "floor"),
        *_fields(ctypes.c_void_p, "moments"),
    ]


class DepthwiseGradient(ctypes.Structure):
    """`struct depthwise_gradient` of cpu.c."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "left g mean added"),
        *_fields(ctypes.c_int, "added_stride"),
        *_fields(ctypes.c_void_p, "out parts sums"),
    ]


class Pool(ctypes.Structure):
    """`struct pool` of cpu.c."""

    _fields_ = [
        *_fields(ctypes.c_int, "batch height width channels out_height out_width stride top left dilation"),
        *_fields(ctypes.c_void_p, "input scale shift added added_scale added_shift"),
    ]


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """cpu.c, compiled and loaded once a process, or None and why not."""
    try:
        # Its OpenMP is the one that torch has loaded, with torch's threads.
        return ctypes.CDLL(str(compiled(SOURCE, FLAGS))), ""
    except (Unavailable, OSError) as error:
        return None, str(error)


def unfit(network: nn.Module) -> str | None:
    """Why a network cannot take cpu.c's functions here; None where it can."""
    if not isinstance(network, Xception):
        return f"only xception has kernels for the processor, not {type(network).__name__}"
    weight = next(network.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"the kernels are for float32 on the processor, not {str(weight.dtype)[6:]} on {weight.device.type}"
    native, reason = library()
    return reason if native is None else None


def measured() -> bool:
    """Whether the kernels run here as where their speed was measured: with AVX2."""
    native, _ = library()
    return native is not None and bool(native.vectors() == 8)


def knows(block: Block) -> bool:
    """Whether every layer of a block is one that cpu.c has."""
    return all(
        isinstance(layer, SeparableConv2d)
        and isinstance(layer.activation, nn.Identity)
        and layer.depthwise.kernel_size == (3, 3)
        for name, layer in block.named_children()
        if name.startswith("sepconv")
    )


def call(name: str, *arguments: object) -> int:
    """A function of cpu.c; tensors become their addresses."""
    native, reason = library()
    assert native is not None, reason
    result: int = native[name](*(address(a) if isinstance(a, Tensor) else a for a in arguments))
    return result


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@dataclass
class Affine:
    """``max(x * scale + shift, floor)`` with a scale and a shift a channel, or for None only the floor."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    floor: float = NO_FLOOR


RELU = Affine(floor=0.0)
NOTHING = Affine()


def folded(norm: nn.Module, floor: float = NO_FLOOR) -> Affine:
    """A batch norm in evaluation mode, and what bounds it."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.detach().double() - norm.running_mean.double() * scale
    return Affine(scale.float(), shift.float(), floor)


def empty_map(batch: int, channels: int, height: int, width: int) -> Tensor:
    """A map of any values, channels last."""
    return floats(batch * height * width * channels).view(batch, height, width, channels).permute(0, 3, 1, 2)


# Weights


def taps(weight: Tensor) -> Tensor:
    """A depthwise convolution's weights (C, 1, 3, 3) as (9, C)."""
    return weight.detach().flatten(1).t().contiguous()


def matrix(weight: Tensor) -> Tensor:
    """A convolution's weights (N, C, k, k) as (N, k · k · C), in the order in which a patch lies in memory."""
    return weight.detach().permute(0, 2, 3, 1).reshape(len(weight), -1)


@dataclass
class Packed:
    """A right-hand side (depth, columns) in the order in which the product reads it."""

    columns: int
    panels: Tensor


def packed(weight: Tensor) -> Packed:
    """A matrix (depth, columns) of any strides, as right-hand side of a product."""
    depth, columns = weight.shape
    panels = torch.empty(call("packed_floats", depth, columns))
    row, column = (ctypes.c_long(stride) for stride in weight.stride())
    call("pack", weight, row, column, depth, columns, panels, torch.get_num_threads())
    return Packed(columns, panels)


# Left-hand sides


def _left(kind: int, x: Tensor, affine: Affine, side: int = 1, stride: int = 1, padding: int = 0) -> Left:
    batch, channels, height, width = x.shape
    rows, columns = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
    left = Left(kind, batch, height, width, channels, rows, columns, stride, padding, 1, x.data_ptr())
    left.scale, left.shift, left.floor = address(affine.scale), address(affine.shift), affine.floor
    left.kept = (x, affine)  # a structure of addresses keeps nothing alive
    return left


def points(x: Tensor, affine: Affine = NOTHING, stride: int = 1) -> Left:
    """The pixels that a 1 × 1 convolution sees."""
    return _left(POINTS, x, affine, stride=stride)


def patches(x: Tensor, affine: Affine = NOTHING, stride: int = 1, padding: int = 0) -> Left:
    """The patches that a 3 × 3 convolution sees."""
    return _left(PATCHES, x, affine, 3, stride, padding)


def depthwise(x: Tensor, taps: Tensor, affine: Affine = NOTHING, dilation: int = 1) -> Left:
    """A 3 × 3 depthwise convolution, zero-padded to the same size, of the affine map of `x`."""
    left = _left(DEPTHWISE, x, affine)
    left.depthwise, left.dilation = address(taps), dilation
    left.kept += (taps,)
    return left


def gradient(g: Tensor, normed: Tensor, behind: "Behind") -> Left:
    """The gradient of a batch norm's input, `normed`, from `g`, that of its output."""
    left = _left(GRADIENT, g, Affine(behind.scale, behind.shift))
    left.normed, left.mean, left.slope = address(normed), address(behind.mean), address(behind.slope)
    left.kept += (normed, behind)
    return left


# Products


def product(left: Left, right: Packed, affine: Affine = NOTHING, added: Tensor | None = None) -> Tensor:
    """``max(left @ right * scale + shift + added, floor)`` as a map (B, columns, H, W)."""
    out = empty_map(left.batch, right.columns, left.out_height, left.out_width)
    _product(left, right, out, affine, added, None)
    return out


def product_and_moments(left: Left, right: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """``left @ right`` as a map (B, columns, H, W), and the mean and the biased variance of each column."""
    out = empty_map(left.batch, right.columns, left.out_height, left.out_width)
    count, depth = out.numel() // right.columns, left.channels * (9 if left.kind == PATCHES else 1)
    rows = call("tile_pixels", count, depth)
    moments = torch.empty(-(-count // rows), 2, right.columns)
    _product(left, right, out, NOTHING, None, moments)
    mean, variance = torch.empty(2, right.columns)
    call("join_moments", moments, count, rows, right.columns, mean, variance, torch.get_num_threads())
    return out, mean, variance


def _product(
    left: Left, right: Packed, out: Tensor, affine: Affine, added: Tensor | None, moments: Tensor | None
) -> None:
    after = Right(right.columns, address(right.panels), address(out), address(affine.scale), address(affine.shift))
    after.added, after.floor, after.moments = address(added), affine.floor, address(moments)
    if call("product", ctypes.byref(left), ctypes.byref(after), torch.get_num_threads()):
        raise MemoryError("cpu.c found no memory for a tile")


def weight_gradient(left: Left, behind: Left) -> Tensor:
    """Gradient (N, depth) of a product's right-hand side, transposed; `behind` is the :func:`gradient` of its result."""
    depth, count = left.channels * (9 if left.kind == PATCHES else 1), left.batch * left.out_height * left.out_width
    parts = call("weight_gradient_floats", behind.channels, depth, count)
    out, threads = torch.empty(behind.channels, depth), torch.get_num_threads()
    if call("weight_gradient", ctypes.byref(left), ctypes.byref(behind), floats(parts), out, threads):
        raise MemoryError("cpu.c found no memory for a tile")
    return out


# Other functions of maps


def affine_map(x: Tensor, affine: Affine, added: Tensor | None = None) -> Tensor:
    """``max(x * scale + shift + added, floor)``."""
    out, channels = empty_map(*x.shape), x.shape[1]
    floor = ctypes.c_float(affine.floor)
    arguments = (x, x.numel() // channels, channels, affine.scale, affine.shift, address(added), floor, out)
    call("affine", *arguments, torch.get_num_threads())
    return out


def gradient_map(left: Left) -> Tensor:
    """What :func:`gradient` describes, in memory."""
    out = empty_map(left.batch, left.channels, left.height, left.width)
    call("gradient_map", ctypes.byref(left), out, torch.get_num_threads())
    return out


def pool(
    x: Tensor,
    stride: int,
    dilation: int = 1,
    affine: Affine = NOTHING,
    added: Tensor | None = None,
    added_affine: Affine = NOTHING,
) -> Tensor:
    """`same_max_pool` of the affine map of `x`, plus the affine map of `added`; floors do not count."""
    batch, channels, height, width = x.shape
    out = empty_map(batch, channels, -(-height // stride), -(-width // stride))
    how = _pool(x, stride, dilation, affine, out.shape)
    how.added = address(added)
    how.added_scale, how.added_shift = address(added_affine.scale), address(added_affine.shift)
    call("pool", ctypes.byref(how), out, torch.get_num_threads())
    return out


def _pool(x: Tensor, stride: int, dilation: int, affine: Affine, shape: torch.Size) -> Pool:
    batch, channels, height, width = x.shape
    top, left = (dilation * (-(-size // dilation) % 2) for size in (height, width))
    how = Pool(batch, height, width, channels, *shape[2:], stride, top, left, dilation, x.data_ptr())
    how.scale, how.shift = address(affine.scale), address(affine.shift)
    return how


# Gradients


@dataclass
class Behind:
    """The gradient of a batch norm's input u from that of its output g: ``g * scale + (u - mean) * slope + shift``."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    slope: Tensor


MOST = 128
"""Tasks of a sum over pixels in cpu.c."""


def norm_sums(g: Tensor, x: Tensor, mean: Tensor, mask: Affine | None = None) -> tuple[Tensor, Tensor]:
    """The sums (2, C) of `g` and of ``g * (x - mean)``; with `mask`, of `g` where the affine map of `x` is positive.

    Returns:
        The gradient, masked or as it is, and the sums.
    """
    channels = x.shape[1]
    sums, parts = torch.empty(2, channels), torch.empty(MOST, 2, channels)
    masked = None if mask is None else empty_map(*x.shape)
    scale, shift = (None, None) if mask is None else (mask.scale, mask.shift)
    arguments = (g, x, x.numel() // channels, channels, mean, address(scale), address(shift), address(masked))
    call("norm_sums", *arguments, parts, sums, torch.get_num_threads())
    return g if masked is None else masked, sums


def pool_backward(
    g: Tensor, x: Tensor, stride: int, dilation: int, affine: Affine, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`pool` for the affine map of `x`, and its sums as those of :func:`norm_sums`."""
    how = _pool(x, stride, dilation, affine, g.shape)
    out, sums = empty_map(*x.shape), torch.empty(2, x.shape[1])
    parts = torch.empty(call("pool_bands", ctypes.byref(how)), 2, x.shape[1])
    call("pool_backward", ctypes.byref(how), g, mean, out, parts, sums, torch.get_num_threads())
    return out, sums


def depthwise_backward(
    left: Left, g: Tensor, mean: Tensor | None, added: Tensor | None = None, added_stride: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a :func:`depthwise` from `g`, that of its result.

    Returns:
        The gradient of the affine map that it reads, zero where that does not exceed its floor, plus `added` at every
        `added_stride`-th pixel; the gradient (9, C) of the taps; the sums of :func:`norm_sums`.
    """
    out = empty_map(left.batch, left.channels, left.height, left.width)
    parts, sums = torch.empty(MOST, 11, left.channels), torch.empty(11, left.channels)
    how = DepthwiseGradient(ctypes.addressof(left), address(g), address(mean), address(added), added_stride)
    how.out, how.parts, how.sums = address(out), address(parts), address(sums)
    call("depthwise_backward", ctypes.byref(how), torch.get_num_threads())
    return out, sums[:9], sums[9:]
