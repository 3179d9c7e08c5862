"""3 × 3 depthwise convolutions, stride 1, padding 1: normalisation and ReLU before them, and all their gradients.

A program owns a strip, a few columns by some channels, and walks down the rows of its images. Of each row it loads
three tiles, shifted by -1, 0 and 1 columns (two of them from the cache), and adds them to the outputs they touch, which
it carries in registers: each value is read once from memory, normalised in registers and never stored normalised.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xception_pl.kernels.ops.normalise import load_row, multiple
from xception_pl.kernels.tiles import aligned, programs, tile_for


@triton.jit
def in_image(columns, row, height, width):
    """Which of a row's pixels at `columns` are inside of the image, (columns, 1)."""
    rows = tl.zeros_like(columns) + row  # a tensor: the interpreter's loop counters are Python's
    return ((columns >= 0) & (columns < width) & (rows >= 0) & (rows < height))[:, None]


@triton.jit
def load_pixels(x, at, columns, row, height, width, valid):
    """A tile of row `row` at `columns`, 0 outside of the image, and which of it is inside."""
    inside = valid & in_image(columns, row, height, width)
    return tl.load(x + at, mask=inside, other=0.0), inside


@triton.jit
def activate(tile, inside, scale, shift, NORM: tl.constexpr, RELU: tl.constexpr):
    """ReLU(tile · scale + shift) in float32, as far as the flags say; the padding stays 0."""
    z = tile.to(tl.float32)
    if NORM:
        z = tl.where(inside, z * scale + shift, 0.0)
    if RELU:
        z = tl.where(z > 0, z, z * 0.0)
    return z


@triton.jit
def load_tap(weight, tap: tl.constexpr, c, channels):
    return tl.load(weight + tap * channels + c, mask=c < channels, other=0.0)[None, :]


@triton.jit
def depthwise_kernel(
    x, table, weight, out, images, height, width, channels,
    ALIGN: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = the convolution of ReLU(x · scale + shift)."""
    channels = multiple(channels, ALIGN)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.program_id(2)
    valid = (c < channels)[None, :]
    scale = load_row(table, 0, c, channels)[None, :] if NORM else 1.0
    shift = load_row(table, 1, c, channels)[None, :] if NORM else 0.0
    w00, w01, w02 = load_tap(weight, 0, c, channels), load_tap(weight, 1, c, channels), load_tap(weight, 2, c, channels)
    w10, w11, w12 = load_tap(weight, 3, c, channels), load_tap(weight, 4, c, channels), load_tap(weight, 5, c, channels)
    w20, w21, w22 = load_tap(weight, 6, c, channels), load_tap(weight, 7, c, channels), load_tap(weight, 8, c, channels)
    above = tl.zeros((COLUMNS, CHANNELS), tl.float32)  # the output of the row before, of which one row is still to come
    here = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    step = width * channels
    base = tl.cast(image, tl.int64) * height * step
    tile_at = j[:, None] * channels + c[None, :]
    for row in tl.range(0, height + 1, num_stages=STAGES):
        at = base + row * step + tile_at
        left, inside = load_pixels(x, at - channels, j - 1, row, height, width, valid)
        left = activate(left, inside, scale, shift, NORM, RELU)
        middle, inside = load_pixels(x, at, j, row, height, width, valid)
        middle = activate(middle, inside, scale, shift, NORM, RELU)
        right, inside = load_pixels(x, at + channels, j + 1, row, height, width, valid)
        right = activate(right, inside, scale, shift, NORM, RELU)
        above += w20 * left + w21 * middle + w22 * right
        store = valid & in_image(j, row - 1, height, width)
        tl.store(out + at - step, above.to(out.dtype.element_ty), mask=store)
        above = here + (w10 * left + w11 * middle + w12 * right)
        here = w00 * left + w01 * middle + w02 * right


@triton.jit
def depthwise_backward_kernel(
    grad, x, table, weight, add, dx, out, partial, images, height, width, channels, add_height, add_width,
    ALIGN: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, ADD: tl.constexpr, ADD_MASKED: tl.constexpr, OUT: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the gradient of the output: that of z (or x), of the weight, z's sums for batch norm, and the output again.

    `add` is another gradient of the same tensor, the shortcut's: with ADD = 1 one a pixel, with ADD = 2 one at every
    second row and column; it joins before the ReLU's mask if ADD_MASKED, else after it. `partial` gets the sums of each
    program, (programs, 11, C): of dz, of dz · (x - mean), and the nine of the weight. With OUT the convolution's output
    is computed again and stored: the weight gradient of the pointwise convolution reads it next.
    """
    channels = multiple(channels, ALIGN)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (c < channels)[None, :]
    scale = load_row(table, 0, c, channels)[None, :] if NORM else 1.0
    shift = load_row(table, 1, c, channels)[None, :] if NORM else 0.0
    mean = load_row(table, 2, c, channels)[None, :] if NORM else 0.0
    w00, w01, w02 = load_tap(weight, 0, c, channels), load_tap(weight, 1, c, channels), load_tap(weight, 2, c, channels)
    w10, w11, w12 = load_tap(weight, 3, c, channels), load_tap(weight, 4, c, channels), load_tap(weight, 5, c, channels)
    w20, w21, w22 = load_tap(weight, 6, c, channels), load_tap(weight, 7, c, channels), load_tap(weight, 8, c, channels)
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    first, second = zero, zero
    d00, d01, d02 = zero, zero, zero
    d10, d11, d12 = zero, zero, zero
    d20, d21, d22 = zero, zero, zero
    step = width * channels
    tile_at = j[:, None] * channels + c[None, :]
    for image in range(tl.program_id(2), images, tl.num_programs(2)):
        base = tl.cast(image, tl.int64) * height * step
        # At each turn `row` is the row of `grad` that is read; x is read one row ahead of it.
        x_above, x_here = zero, zero  # rows row - 1 and row of x, as stored
        a_above, a_here = zero, zero  # the same, activated
        g_above, g_here = zero, zero  # gradients of those rows: the first lacks this row's part alone
        o_here, o_below = zero, zero  # outputs of rows row and row + 1
        for row in tl.range(-1, height + 1, num_stages=STAGES):
            at = base + row * step + tile_at
            left, _ = load_pixels(grad, at - channels, j - 1, row, height, width, valid)
            middle, _ = load_pixels(grad, at, j, row, height, width, valid)
            right, _ = load_pixels(grad, at + channels, j + 1, row, height, width, valid)
            left, middle, right = left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)
            stored, inside = load_pixels(x, at + step, j, row + 1, height, width, valid)
            stored = stored.to(tl.float32)
            a_below = activate(stored, inside, scale, shift, NORM, RELU)
            # A pixel is read through the flipped kernel: its right neighbour's gradient through the left tap.
            g_above += w02 * left + w01 * middle + w00 * right
            g_here += w12 * left + w11 * middle + w10 * right
            g_below = w22 * left + w21 * middle + w20 * right
            d00 += a_above * right
            d01 += a_above * middle
            d02 += a_above * left
            d10 += a_here * right
            d11 += a_here * middle
            d12 += a_here * left
            d20 += a_below * right
            d21 += a_below * middle
            d22 += a_below * left
            if OUT:
                a_left, inside = load_pixels(x, at + step - channels, j - 1, row + 1, height, width, valid)
                a_left = activate(a_left, inside, scale, shift, NORM, RELU)
                a_right, inside = load_pixels(x, at + step + channels, j + 1, row + 1, height, width, valid)
                a_right = activate(a_right, inside, scale, shift, NORM, RELU)
                o_here += w20 * a_left + w21 * a_below + w22 * a_right
                tl.store(out + at, o_here.to(out.dtype.element_ty), mask=valid & in_image(j, row, height, width))
                o_here = o_below + (w10 * a_left + w11 * a_below + w12 * a_right)
                o_below = w00 * a_left + w01 * a_below + w02 * a_right
            # the row above is complete
            done = valid & in_image(j, row - 1, height, width)
            if ADD == 1:
                other = tl.load(add + at - step, mask=done, other=0.0).to(tl.float32)
            elif ADD == 2:
                above = row - 1
                spot = (tl.cast(image, tl.int64) * add_height + above // 2) * add_width * channels
                even = done & ((j % 2 == 0) & ((tl.zeros_like(j) + above) % 2 == 0))[:, None]
                other = tl.load(add + spot + (j // 2)[:, None] * channels + c[None, :], mask=even, other=0.0)
                other = other.to(tl.float32)
            else:
                other = zero
            if ADD_MASKED:
                g_above += other
            if RELU:
                g_above = tl.where(a_above > 0, g_above, g_above * 0.0)
            if not ADD_MASKED:
                g_above += other
            kept = g_above.to(dx.dtype.element_ty)
            tl.store(dx + at - step, kept, mask=done)
            if NORM:
                counted = tl.where(done, kept.to(tl.float32), 0.0)
                first += counted
                second += counted * (x_above - mean)
            x_above, x_here = x_here, stored
            a_above, a_here = a_here, a_below
            g_above, g_here = g_here, g_below
    program = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    at = partial + program.to(tl.int64) * 11 * channels + c
    tl.store(at, tl.sum(first, 0), mask=c < channels)
    tl.store(at + channels, tl.sum(second, 0), mask=c < channels)
    tl.store(at + 2 * channels, tl.sum(d00, 0), mask=c < channels)
    tl.store(at + 3 * channels, tl.sum(d01, 0), mask=c < channels)
    tl.store(at + 4 * channels, tl.sum(d02, 0), mask=c < channels)
    tl.store(at + 5 * channels, tl.sum(d10, 0), mask=c < channels)
    tl.store(at + 6 * channels, tl.sum(d11, 0), mask=c < channels)
    tl.store(at + 7 * channels, tl.sum(d12, 0), mask=c < channels)
    tl.store(at + 8 * channels, tl.sum(d20, 0), mask=c < channels)
    tl.store(at + 9 * channels, tl.sum(d21, 0), mask=c < channels)
    tl.store(at + 10 * channels, tl.sum(d22, 0), mask=c < channels)


def taps(weight: Tensor) -> Tensor:
    """A depthwise kernel (C, 1, 3, 3) as the nine rows (9, C) that the kernels read, in float32."""
    return weight.detach().float().reshape(-1, 9).t().contiguous()


def depthwise(x: Tensor, table: Tensor | None, weight: Tensor, *, relu: bool) -> Tensor:
    """The convolution of ReLU(x · scale + shift), (B, H, W, C) to the same; no table, no normalisation."""
    images, height, width, channels = x.shape
    out = torch.empty_like(x)
    tile = tile_for("depthwise", f"{channels}").options
    grid = (triton.cdiv(width, tile["COLUMNS"]), triton.cdiv(channels, tile["CHANNELS"]), images)
    depthwise_kernel[grid](
        x, x if table is None else table, taps(weight), out, images, height, width, channels,
        NORM=table is not None, RELU=relu, ALIGN=aligned(channels), **tile,
    )  # fmt: skip
    return out


def depthwise_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor | None,
    weight: Tensor,
    *,
    relu: bool,
    add: Tensor | None = None,
    add_masked: bool = False,
    again: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All gradients of :func:`depthwise`.

    Args:
        grad: gradient of the output (B, H, W, C).
        x, table, weight, relu: as given to :func:`depthwise`.
        add: the shortcut's gradient of the same tensor, at every pixel or (B, ⌈H / 2⌉, ⌈W / 2⌉, C) at every second.
        add_masked: whether `add` is a gradient of what follows the ReLU.
        again: compute the output again.

    Returns:
        The gradient of z = x · scale + shift (without a table, of x); its partial sums (programs, 2, C); the gradient
        of the weight (C, 1, 3, 3) in float32; the output, or None.
    """
    images, height, width, channels = x.shape
    dx = torch.empty_like(x)
    out = torch.empty_like(x) if again else None
    chosen = tile_for("depthwise_backward", f"{channels}")
    tile = chosen.options
    across, deep = triton.cdiv(width, tile["COLUMNS"]), triton.cdiv(channels, tile["CHANNELS"])
    walks = programs(images, across * deep, chosen.per_sm)
    partial = torch.empty(across * walks, 11, channels, dtype=torch.float32, device=x.device)
    kind = 0 if add is None else 1 if add.shape == x.shape else 2
    depthwise_backward_kernel[(across, deep, walks)](
        grad, x, x if table is None else table, taps(weight), grad if add is None else add,
        dx, dx if out is None else out, partial, images, height, width, channels,
        0 if add is None else add.shape[1], 0 if add is None else add.shape[2],
        NORM=table is not None, RELU=relu, ADD=kind, ADD_MASKED=add_masked, OUT=again, ALIGN=aligned(channels), **tile,
    )  # fmt: skip
    d_weight = partial[:, 2:].sum(0).t().reshape(weight.shape)
    return dx, partial[:, :2], d_weight, out
