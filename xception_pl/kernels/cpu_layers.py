"""cpu.c's functions on tensors: float32, channels last, on the processor."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xception_pl.compiled import Unavailable, compiled
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
    return torch.empty((batch, channels, height, width), memory_format=torch.channels_last)


# Weights


def taps(depthwise: nn.Conv2d) -> Tensor:
    """A depthwise convolution's weights (C, 1, 3, 3) as (9, C)."""
    return depthwise.weight.detach().flatten(1).t().contiguous()


def matrix(conv: nn.Conv2d) -> Tensor:
    """A convolution's weights (N, C, k, k) as (N, k · k · C), in the order in which a patch lies in memory."""
    return conv.weight.detach().permute(0, 2, 3, 1).reshape(conv.out_channels, -1).contiguous()


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


def product(left: Left, right: Packed, affine: Affine = NOTHING, added: Tensor | None = None) -> Tensor:
    """``max(left @ right * scale + shift + added, floor)`` as a map (B, columns, H, W)."""
    out = empty_map(left.batch, right.columns, left.out_height, left.out_width)
    _product(left, right, out, affine, added, None)
    return out


def _product(
    left: Left, right: Packed, out: Tensor, affine: Affine, added: Tensor | None, moments: Tensor | None
) -> None:
    after = Right(right.columns, address(right.panels), address(out), address(affine.scale), address(affine.shift))
    after.added, after.floor, after.moments = address(added), affine.floor, address(moments)
    if call("product", ctypes.byref(left), ctypes.byref(after), torch.get_num_threads()):
        raise MemoryError("cpu.c found no memory for a tile")


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
    top, left = (dilation * (-(-size // dilation) % 2) for size in (height, width))
    how = Pool(batch, height, width, channels, *out.shape[2:], stride, top, left, dilation, x.data_ptr())
    how.scale, how.shift, how.added = address(affine.scale), address(affine.shift), address(added)
    how.added_scale, how.added_shift = address(added_affine.scale), address(added_affine.shift)
    call("pool", ctypes.byref(how), out, torch.get_num_threads())
    return out
