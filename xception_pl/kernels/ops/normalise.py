"""Batch normalisation in parts: statistics, the table that applies them, and the sums and table of its gradient.

All tensors are NHWC: (B, H, W, C), contiguous. Statistics travel as small float32 tables with one column a channel:

- forward, (5, C): scale, shift, mean, 1 / standard deviation, 1 / pixels; z = y · scale + shift.
- backward, (4, C): a, b, c, mean; the gradient of y is a · dz + b · (y - mean) + c, where dz is that of z.

Every sum over pixels has two stages, each in a fixed order: a program adds up its own pixels, one program a few
channels then adds up the programs. No atomics, so a step gives the same bits each time.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor, nn

from xception_pl.kernels.tiles import aligned, programs, tile_for

SCALE, SHIFT, MEAN, RSTD, INVERSE_COUNT = range(5)


@triton.jit
def multiple(channels, ALIGN: tl.constexpr):
    """The same number, as one that the compiler knows to be a multiple: of 728 it would only know that 16 is no divisor.

    Without that each access of the 728 channels would be two bytes wide instead of sixteen.
    """
    return channels // ALIGN * ALIGN


@triton.jit
def load_row(table, row: tl.constexpr, c, channels):
    """One row of a table at channels `c`; 0 beyond the last."""
    return tl.load(table + row * channels + c, mask=c < channels, other=0.0)


@triton.jit
def tile_statistics(tile, valid, count):
    """Mean and sum of squared deviations of the `count` `valid` rows of a tile, whose other rows are 0."""
    mean = tl.sum(tile, 0) / count
    off = tl.where(valid[:, None], tile - mean[None, :], 0.0)
    return mean, tl.sum(off * off, 0)


@triton.jit
def combine(count, mean, m2, added, its_mean, its_m2):
    """Chan's sum of two (count, mean, sum of squared deviations): no digits cancel."""
    total = count + added
    delta = its_mean - mean
    share = added / total
    return total, mean + delta * share, m2 + its_m2 + delta * delta * (count * share)


@triton.jit
def statistics_kernel(y, partial, rows, channels, ALIGN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Each program's (mean, M2, count) of its rows: `partial` is (programs, 3, C)."""
    channels = multiple(channels, ALIGN)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count = tl.zeros((CHANNELS,), tl.float32)
    mean = tl.zeros((CHANNELS,), tl.float32)
    m2 = tl.zeros((CHANNELS,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        p = start + tl.arange(0, ROWS)
        inside = (p[:, None] < rows) & (c[None, :] < channels)
        tile = tl.load(y + p[:, None].to(tl.int64) * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
        added = tl.minimum(rows - start, ROWS)
        its_mean, its_m2 = tile_statistics(tile, p < rows, added)
        count, mean, m2 = combine(count, mean, m2, added, its_mean, its_m2)
    store_statistics(partial, tl.program_id(0), c, channels, count, mean, m2)


@triton.jit
def merge_kernel(tiles, partial, parts, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(parts, 2, C) of (mean, M2), each of ROWS rows but the last, to (programs, 3, C)."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count = tl.zeros((CHANNELS,), tl.float32)
    mean = tl.zeros((CHANNELS,), tl.float32)
    m2 = tl.zeros((CHANNELS,), tl.float32)
    for part in range(tl.program_id(0), parts, tl.num_programs(0)):
        at = tiles + tl.cast(part, tl.int64) * 2 * channels + c
        its_mean = tl.load(at, mask=c < channels, other=0.0)
        its_m2 = tl.load(at + channels, mask=c < channels, other=0.0)
        added = tl.minimum(rows - part * ROWS, ROWS)
        count, mean, m2 = combine(count, mean, m2, added, its_mean, its_m2)
    store_statistics(partial, tl.program_id(0), c, channels, count, mean, m2)


@triton.jit
def store_statistics(partial, program, c, channels, count, mean, m2):
    at = partial + program * 3 * channels + c
    tl.store(at, mean, mask=c < channels)
    tl.store(at + channels, m2, mask=c < channels)
    tl.store(at + 2 * channels, count, mask=c < channels)


@triton.jit
def finish_kernel(
    partial, gamma, beta, running_mean, running_var, table, merged, parts, channels, momentum, eps,
    RUNNING: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """(parts, 3, C) to one (3, C) and the forward table; the running statistics move as nn.BatchNorm2d's."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    count = tl.zeros((CHANNELS,), tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, parts, PARTS):
        i = start + tl.arange(0, PARTS)
        inside = (i[:, None] < parts) & (c[None, :] < channels)
        at = partial + i[:, None] * 3 * channels + c[None, :]
        counts = tl.load(at + 2 * channels, mask=inside, other=0.0)
        total += tl.sum(tl.load(at, mask=inside, other=0.0) * counts, 0)
        count += tl.sum(counts, 0)
    mean = total / tl.maximum(count, 1.0)
    m2 = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, parts, PARTS):
        i = start + tl.arange(0, PARTS)
        inside = (i[:, None] < parts) & (c[None, :] < channels)
        at = partial + i[:, None] * 3 * channels + c[None, :]
        counts = tl.load(at + 2 * channels, mask=inside, other=0.0)
        off = tl.where(inside, tl.load(at, mask=inside, other=0.0) - mean[None, :], 0.0)
        m2 += tl.sum(tl.load(at + channels, mask=inside, other=0.0) + counts * off * off, 0)
    store_statistics(merged, 0, c, channels, count, mean, m2)
    valid = c < channels
    var = m2 / tl.maximum(count, 1.0)
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = tl.load(gamma + c, mask=valid, other=0.0).to(tl.float32) * rstd
    shift = tl.load(beta + c, mask=valid, other=0.0).to(tl.float32) - mean * scale
    tl.store(table + c, scale, mask=valid)
    tl.store(table + channels + c, shift, mask=valid)
    tl.store(table + 2 * channels + c, mean, mask=valid)
    tl.store(table + 3 * channels + c, rstd, mask=valid)
    tl.store(table + 4 * channels + c, 1.0 / tl.maximum(count, 1.0), mask=valid)
    if RUNNING:
        old_mean = tl.load(running_mean + c, mask=valid, other=0.0).to(tl.float32)
        old_var = tl.load(running_var + c, mask=valid, other=0.0).to(tl.float32)
        unbiased = m2 / tl.maximum(count - 1.0, 1.0)
        new_mean = old_mean + momentum * (mean - old_mean)
        new_var = old_var + momentum * (unbiased - old_var)
        tl.store(running_mean + c, new_mean.to(running_mean.dtype.element_ty), mask=valid)
        tl.store(running_var + c, new_var.to(running_var.dtype.element_ty), mask=valid)


@triton.jit
def apply_kernel(
    y, table, residual, out, rows, channels,
    ALIGN: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = y · scale + shift, then ReLU or plus a residual."""
    channels = multiple(channels, ALIGN)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (p[:, None] < rows) & (c[None, :] < channels)
    at = p[:, None].to(tl.int64) * channels + c[None, :]
    z = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    z = z * load_row(table, 0, c, channels)[None, :] + load_row(table, 1, c, channels)[None, :]
    if RELU:
        z = tl.where(z > 0, z, z * 0.0)  # z * 0: a NaN stays one, as in torch
    if RESIDUAL:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sums_kernel(
    grad, y, table, dz, partial, rows, channels,
    ALIGN: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of dz and dz · (y - mean) a program, (programs, 2, C); with RELU, dz is the masked gradient, and is kept."""
    channels = multiple(channels, ALIGN)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    scale = load_row(table, 0, c, channels)[None, :]
    shift = load_row(table, 1, c, channels)[None, :]
    mean = load_row(table, 2, c, channels)[None, :]
    first = tl.zeros((CHANNELS,), tl.float32)
    second = tl.zeros((CHANNELS,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        p = start + tl.arange(0, ROWS)
        inside = (p[:, None] < rows) & (c[None, :] < channels)
        at = p[:, None].to(tl.int64) * channels + c[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0)
        tile = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(tile * scale + shift > 0, g, g * 0)
            tl.store(dz + at, g, mask=inside)
        g = g.to(tl.float32)
        first += tl.sum(g, 0)
        second += tl.sum(g * (tile - mean), 0)
    at = partial + tl.program_id(0) * 2 * channels + c
    tl.store(at, first, mask=c < channels)
    tl.store(at + channels, second, mask=c < channels)


@triton.jit
def gradient_table_kernel(
    partial, table, sums, out, parts, stride, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Adds up `parts` pairs of sums, `stride` apart, and makes the backward table of them."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.zeros((CHANNELS,), tl.float32)
    second = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, parts, PARTS):
        i = start + tl.arange(0, PARTS)
        inside = (i[:, None] < parts) & (c[None, :] < channels)
        at = partial + i[:, None].to(tl.int64) * stride + c[None, :]
        first += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        second += tl.sum(tl.load(at + channels, mask=inside, other=0.0), 0)
    valid = c < channels
    tl.store(sums + c, first, mask=valid)
    tl.store(sums + channels + c, second, mask=valid)
    scale = load_row(table, 0, c, channels)
    rstd = load_row(table, 3, c, channels)
    inverse = load_row(table, 4, c, channels)
    tl.store(out + c, scale, mask=valid)
    tl.store(out + channels + c, -scale * rstd * rstd * second * inverse, mask=valid)
    tl.store(out + 2 * channels + c, -scale * first * inverse, mask=valid)
    tl.store(out + 3 * channels + c, load_row(table, 2, c, channels), mask=valid)


@triton.jit
def gradient_tile(dz, y, table, c, channels):
    """The gradient of y, float32, from tiles of dz and y, (rows, channels `c`)."""
    a = load_row(table, 0, c, channels)[None, :]
    b = load_row(table, 1, c, channels)[None, :]
    shift = load_row(table, 2, c, channels)[None, :]
    mean = load_row(table, 3, c, channels)[None, :]
    return a * dz.to(tl.float32) + (b * (y.to(tl.float32) - mean) + shift)


@triton.jit
def gradient_kernel(dz, y, table, out, rows, channels, ALIGN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The gradient of y, written out: where a library's convolution reads it."""
    channels = multiple(channels, ALIGN)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (p[:, None] < rows) & (c[None, :] < channels)
    at = p[:, None].to(tl.int64) * channels + c[None, :]
    g = gradient_tile(
        tl.load(dz + at, mask=inside, other=0.0), tl.load(y + at, mask=inside, other=0.0), table, c, channels
    )
    tl.store(out + at, g.to(out.dtype.element_ty), mask=inside)


def rows_of(y: Tensor) -> int:
    """Pixels of a batch: B · H · W."""
    return y.numel() // y.shape[-1]


def statistics(y: Tensor) -> Tensor:
    """Partial statistics (programs, 3, C) of a batch (B, H, W, C): mean, M2 and count of each program's pixels."""
    channels, rows = y.shape[-1], rows_of(y)
    chosen = tile_for("sums", f"{channels}")
    tile = chosen.options
    count = programs(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["CHANNELS"]), chosen.per_sm)
    partial = torch.empty(count, 3, channels, dtype=torch.float32, device=y.device)
    statistics_kernel[(count, triton.cdiv(channels, tile["CHANNELS"]))](
        y, partial, rows, channels, ALIGN=aligned(channels), **tile
    )
    return partial


def merge(tiles: Tensor, rows: int, tile_rows: int) -> Tensor:
    """Partial statistics (programs, 3, C) of those of tiles, (tiles, 2, C), each of `tile_rows` rows but the last."""
    parts, _, channels = tiles.shape
    count = programs(parts, triton.cdiv(channels, 128), 4)
    partial = tiles.new_empty(count, 3, channels)
    merge_kernel[(count, triton.cdiv(channels, 128))](
        tiles, partial, parts, rows, channels, ROWS=tile_rows, CHANNELS=128, num_warps=1
    )
    return partial


def finish(partial: Tensor, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> Tensor:
    """The forward table (5, C) of partial statistics; moves the layer's running statistics.

    A SyncBatchNorm's statistics are those of all ranks: each rank merges its own, all gather them, and each merges
    them in the order of ranks.
    """
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a cumulative average, as in nn.BatchNorm2d
            momentum = 1.0 / float(norm.num_batches_tracked)
    group = synchronised(norm)
    if group is not None:
        merged = _finish(partial, norm, None)[1]
        gathered = torch.empty(dist.get_world_size(group), *merged.shape, dtype=merged.dtype, device=merged.device)
        dist.all_gather(list(gathered.unbind(0)), merged, group=group)
        partial = gathered
    return _finish(partial, norm, momentum)[0]


def _finish(partial: Tensor, norm: nn.Module, momentum: float | None) -> tuple[Tensor, Tensor]:
    parts, _, channels = partial.shape
    table = partial.new_empty(5, channels)
    merged = partial.new_empty(3, channels)
    running = norm.running_mean is not None and momentum is not None
    finish_kernel[(triton.cdiv(channels, 32),)](
        partial, norm.weight, norm.bias,
        norm.running_mean if running else table, norm.running_var if running else table,
        table, merged, parts, channels, momentum or 0.0, norm.eps,
        RUNNING=running, PARTS=32, CHANNELS=32,
    )  # fmt: skip
    return table, merged


def synchronised(norm: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that share a layer's statistics; None where it has its own."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def apply(y: Tensor, table: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
    """Batch normalisation by a table, then ReLU or plus a residual; (B, H, W, C) to the same."""
    channels, rows = y.shape[-1], rows_of(y)
    out = torch.empty_like(y)
    tile = tile_for("elementwise", f"{channels}").options
    apply_kernel[(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["CHANNELS"]))](
        y, table, y if residual is None else residual, out, rows, channels,
        RELU=relu, RESIDUAL=residual is not None, ALIGN=aligned(channels), **tile,
    )  # fmt: skip
    return out


def sums(grad: Tensor, y: Tensor, table: Tensor, *, relu: bool = False) -> tuple[Tensor, Tensor]:
    """dz and its partial sums (programs, 2, C), where `grad` is the gradient of z, or with `relu` of ReLU(z)."""
    channels, rows = y.shape[-1], rows_of(y)
    chosen = tile_for("sums", f"{channels}")
    tile = chosen.options
    dz = torch.empty_like(grad) if relu else grad
    count = programs(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["CHANNELS"]), chosen.per_sm)
    partial = torch.empty(count, 2, channels, dtype=torch.float32, device=y.device)
    sums_kernel[(count, triton.cdiv(channels, tile["CHANNELS"]))](
        grad, y, table, dz, partial, rows, channels, RELU=relu, ALIGN=aligned(channels), **tile
    )
    return dz, partial


def gradient_table(partial: Tensor, table: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The backward table (4, C) of partial sums (programs, ≥ 2, C), and the gradients of the layer's weight and bias.

    The first two rows of each part are the sums of dz and of dz · (y - mean). Weight and bias get this rank's own
    gradients, as SyncBatchNorm gives them; those of y need the sums of all ranks.
    """
    local = _gradient_table(partial, table)
    out, own = local
    group = synchronised(norm)
    if group is not None:
        everyone = own.clone()
        dist.all_reduce(everyone, group=group)
        out, _ = _gradient_table(everyone[None], table)
    return out, own[1] * table[RSTD], own[0]


def _gradient_table(partial: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    parts, _, channels = partial.shape
    out, total = table.new_empty(4, channels), table.new_empty(2, channels)
    gradient_table_kernel[(triton.cdiv(channels, 32),)](
        partial, table, total, out, parts, partial.stride(0), channels, PARTS=32, CHANNELS=32
    )
    return out, total


def gradient(dz: Tensor, y: Tensor, table: Tensor) -> Tensor:
    """The gradient of y from that of z, by the backward table."""
    channels, rows = y.shape[-1], rows_of(y)
    out = torch.empty_like(dz)
    tile = tile_for("elementwise", f"{channels}").options
    gradient_kernel[(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["CHANNELS"]))](
        dz, y, table, out, rows, channels, ALIGN=aligned(channels), **tile
    )
    return out
