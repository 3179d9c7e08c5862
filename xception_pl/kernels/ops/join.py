"""The end of a block that pools: 3 × 3 max pooling with stride 2, plus the shortcut, each after its batch norm.

Windows start as `same_max_pool` in nets/xception.py has them: PAD_ROWS (PAD_COLUMNS) is 1 for an odd height (width),
else 0. The backward pass finds each window's maximum again instead of reading indices: of equal values the first in
the window's order, as PyTorch takes it. A program owns a strip of the output and walks down its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xception_pl.kernels.ops.depthwise import in_image
from xception_pl.kernels.ops.normalise import load_row, multiple
from xception_pl.kernels.tiles import aligned, programs, tile_for


@triton.jit
def load_normalised(y, at, columns, row, height, width, valid, scale, shift):
    """A tile of z = y · scale + shift; -inf outside of the image. And y itself."""
    inside = valid & in_image(columns, row, height, width)
    stored = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, stored * scale + shift, float("-inf")), stored


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pool_kernel(
    y, table, side, side_table, out, height, width, out_height, out_width, channels,
    ALIGN: tl.constexpr, PAD_ROWS: tl.constexpr, PAD_COLUMNS: tl.constexpr, SHORTCUT: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = max of z over each window + the shortcut's z."""
    channels = multiple(channels, ALIGN)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.program_id(2).to(tl.int64)
    valid = (c < channels)[None, :]
    scale, shift = load_row(table, 0, c, channels)[None, :], load_row(table, 1, c, channels)[None, :]
    column = 2 * j - PAD_COLUMNS
    base = image * height * width * channels
    top = tl.full((COLUMNS, CHANNELS), float("-inf"), tl.float32)  # a window's first row: the last of the one above
    # Before the first window comes its first row alone: row 0 - PAD_ROWS is the last of a window that is not there.
    for i in tl.range(-1, out_height, num_stages=STAGES):
        row = 2 * i - PAD_ROWS + 1
        at = base + row * width * channels + column[:, None] * channels + c[None, :]
        left, _ = load_normalised(y, at, column, row, height, width, valid, scale, shift)
        middle, _ = load_normalised(y, at + channels, column + 1, row, height, width, valid, scale, shift)
        right, _ = load_normalised(y, at + 2 * channels, column + 2, row, height, width, valid, scale, shift)
        best = larger(top, larger(larger(left, middle), right))
        at += width * channels
        left, _ = load_normalised(y, at, column, row + 1, height, width, valid, scale, shift)
        middle, _ = load_normalised(y, at + channels, column + 1, row + 1, height, width, valid, scale, shift)
        right, _ = load_normalised(y, at + 2 * channels, column + 2, row + 1, height, width, valid, scale, shift)
        top = larger(larger(left, middle), right)
        best = larger(best, top)
        spot = (image * out_height + i) * out_width * channels + j[:, None] * channels + c[None, :]
        inside = valid & in_image(j, i, out_height, out_width)
        if SHORTCUT:
            other = tl.load(side + spot, mask=inside, other=0.0).to(tl.float32)
            best += other * load_row(side_table, 0, c, channels)[None, :]
            best += load_row(side_table, 1, c, channels)[None, :]
        tl.store(out + spot, best.to(out.dtype.element_ty), mask=inside)


@triton.jit
def first_of_three(a, b, c, at, best, where):
    """The maximum so far and its place, after three more values at places `at`, `at` + 1, `at` + 2."""
    where = tl.where(a > best, at, where)
    best = larger(a, best)
    where = tl.where(b > best, at + 1, where)
    best = larger(b, best)
    where = tl.where(c > best, at + 2, where)
    return larger(c, best), where


@triton.jit
def store_pixel(dz, at, g, stored, mean, inside, first, second):
    """Stores a gradient and adds it to the sums."""
    kept = g.to(dz.dtype.element_ty)
    tl.store(dz + at, kept, mask=inside)
    counted = tl.where(inside, kept.to(tl.float32), 0.0)
    return first + counted, second + counted * (stored - mean)


@triton.jit
def pool_backward_kernel(
    grad, y, table, side, side_table, dz, partial, images, height, width, out_height, out_width, channels,
    ALIGN: tl.constexpr, PAD_ROWS: tl.constexpr, PAD_COLUMNS: tl.constexpr, SHORTCUT: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dz from the gradient of the block's output; sums for both batch norms, (programs, 4, C).

    Window (i, j) reads rows 2i - PAD_ROWS + (0, 1, 2), and columns alike. The program of window (i, j) writes the four
    pixels that are first in it and in no window to its right and below: of each it asks the up to four windows that
    read it whether it was their maximum. Row i - 1 is carried, column j - 1 is computed again.
    """
    channels = multiple(channels, ALIGN)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (c < channels)[None, :]
    scale, shift = load_row(table, 0, c, channels)[None, :], load_row(table, 1, c, channels)[None, :]
    mean = load_row(table, 2, c, channels)[None, :]
    side_mean = load_row(side_table, 2, c, channels)[None, :] if SHORTCUT else 0.0
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    none = tl.full((COLUMNS, CHANNELS), -1, tl.int32)
    lowest = tl.full((COLUMNS, CHANNELS), float("-inf"), tl.float32)
    first, second, side_first, side_second = zero, zero, zero, zero
    column = 2 * j - PAD_COLUMNS
    step = width * channels
    for image in range(tl.program_id(2), images, tl.num_programs(2)):
        base = tl.cast(image, tl.int64) * height * step
        g_above, where_above = zero, none  # of window (i - 1, j)
        g_corner, where_corner = zero, none  # of window (i - 1, j - 1)
        for i in tl.range(0, out_height, num_stages=STAGES):
            row = 2 * i - PAD_ROWS
            at = base + row * step + column[:, None] * channels + c[None, :]
            # window (i, j - 1) reads the columns -2, -1 and 0 from here, window (i, j) 0, 1 and 2
            best, where = lowest, none
            before, before_where = lowest, none
            z0, y00 = load_normalised(y, at, column, row, height, width, valid, scale, shift)
            z1, y01 = load_normalised(y, at + channels, column + 1, row, height, width, valid, scale, shift)
            z2, _ = load_normalised(y, at + 2 * channels, column + 2, row, height, width, valid, scale, shift)
            m2, _ = load_normalised(y, at - 2 * channels, column - 2, row, height, width, valid, scale, shift)
            m1, _ = load_normalised(y, at - channels, column - 1, row, height, width, valid, scale, shift)
            best, where = first_of_three(z0, z1, z2, 0, best, where)
            before, before_where = first_of_three(m2, m1, z0, 0, before, before_where)
            below = at + step
            z0, y10 = load_normalised(y, below, column, row + 1, height, width, valid, scale, shift)
            z1, y11 = load_normalised(y, below + channels, column + 1, row + 1, height, width, valid, scale, shift)
            z2, _ = load_normalised(y, below + 2 * channels, column + 2, row + 1, height, width, valid, scale, shift)
            m2, _ = load_normalised(y, below - 2 * channels, column - 2, row + 1, height, width, valid, scale, shift)
            m1, _ = load_normalised(y, below - channels, column - 1, row + 1, height, width, valid, scale, shift)
            best, where = first_of_three(z0, z1, z2, 3, best, where)
            before, before_where = first_of_three(m2, m1, z0, 3, before, before_where)
            last = below + step
            z0, _ = load_normalised(y, last, column, row + 2, height, width, valid, scale, shift)
            z1, _ = load_normalised(y, last + channels, column + 1, row + 2, height, width, valid, scale, shift)
            z2, _ = load_normalised(y, last + 2 * channels, column + 2, row + 2, height, width, valid, scale, shift)
            m2, _ = load_normalised(y, last - 2 * channels, column - 2, row + 2, height, width, valid, scale, shift)
            m1, _ = load_normalised(y, last - channels, column - 1, row + 2, height, width, valid, scale, shift)
            best, where = first_of_three(z0, z1, z2, 6, best, where)
            before, before_where = first_of_three(m2, m1, z0, 6, before, before_where)
            spot = (
                (tl.cast(image, tl.int64) * out_height + i) * out_width * channels + j[:, None] * channels + c[None, :]
            )
            window = valid & (j < out_width)[:, None]
            g = tl.load(grad + spot, mask=window, other=0.0).to(tl.float32)
            beside = valid & ((j > 0) & (j < out_width))[:, None]
            g_before = tl.load(grad + spot - channels, mask=beside, other=0.0).to(tl.float32)
            if SHORTCUT:
                other = tl.load(side + spot, mask=window, other=0.0).to(tl.float32)
                side_first += g
                side_second += g * (other - side_mean)
            g00 = tl.where(where == 0, g, 0.0) + tl.where(where_above == 6, g_above, 0.0)
            g00 += tl.where(before_where == 2, g_before, 0.0) + tl.where(where_corner == 8, g_corner, 0.0)
            g01 = tl.where(where == 1, g, 0.0) + tl.where(where_above == 7, g_above, 0.0)
            g10 = tl.where(where == 3, g, 0.0) + tl.where(before_where == 5, g_before, 0.0)
            g11 = tl.where(where == 4, g, 0.0)
            inside = valid & in_image(column, row, height, width)
            first, second = store_pixel(dz, at, g00, y00, mean, inside, first, second)
            inside = valid & in_image(column + 1, row, height, width)
            first, second = store_pixel(dz, at + channels, g01, y01, mean, inside, first, second)
            inside = valid & in_image(column, row + 1, height, width)
            first, second = store_pixel(dz, below, g10, y10, mean, inside, first, second)
            inside = valid & in_image(column + 1, row + 1, height, width)
            first, second = store_pixel(dz, below + channels, g11, y11, mean, inside, first, second)
            g_above, where_above = g, where
            g_corner, where_corner = g_before, before_where
    program = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    at = partial + program.to(tl.int64) * 4 * channels + c
    tl.store(at, tl.sum(first, 0), mask=c < channels)
    tl.store(at + channels, tl.sum(second, 0), mask=c < channels)
    tl.store(at + 2 * channels, tl.sum(side_first, 0), mask=c < channels)
    tl.store(at + 3 * channels, tl.sum(side_second, 0), mask=c < channels)


def pool(y: Tensor, table: Tensor, side: Tensor | None = None, side_table: Tensor | None = None) -> Tensor:
    """The block's output (B, ⌈H / 2⌉, ⌈W / 2⌉, C) from y (B, H, W, C) and the shortcut's y, with their tables."""
    images, height, width, channels = y.shape
    out = y.new_empty(images, -(-height // 2), -(-width // 2), channels)
    tile = tile_for("pool", f"{channels}").options
    grid = (triton.cdiv(out.shape[2], tile["COLUMNS"]), triton.cdiv(channels, tile["CHANNELS"]), images)
    pool_kernel[grid](
        y, table, y if side is None else side, table if side_table is None else side_table, out,
        height, width, out.shape[1], out.shape[2], channels,
        PAD_ROWS=height % 2, PAD_COLUMNS=width % 2, SHORTCUT=side is not None, ALIGN=aligned(channels), **tile,
    )  # fmt: skip
    return out


def pool_backward(
    grad: Tensor, y: Tensor, table: Tensor, side: Tensor | None = None, side_table: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dz of y (B, H, W, C), its partial sums (programs, 2, C), and those of the shortcut, whose dz is `grad` itself."""
    images, height, width, channels = y.shape
    dz = torch.empty_like(y)
    chosen = tile_for("pool_backward", f"{channels}")
    tile = chosen.options
    across, deep = triton.cdiv(grad.shape[2], tile["COLUMNS"]), triton.cdiv(channels, tile["CHANNELS"])
    walks = programs(images, across * deep, chosen.per_sm)
    partial = torch.empty(across * walks, 4, channels, dtype=torch.float32, device=y.device)
    pool_backward_kernel[(across, deep, walks)](
        grad, y, table, y if side is None else side, table if side_table is None else side_table, dz, partial,
        images, height, width, grad.shape[1], grad.shape[2], channels,
        PAD_ROWS=height % 2, PAD_COLUMNS=width % 2, SHORTCUT=side is not None, ALIGN=aligned(channels), **tile,
    )  # fmt: skip
    return dz, partial[:, :2], partial[:, 2:]
