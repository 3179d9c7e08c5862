"""1 × 1 convolutions as matrix products: batch norm's statistics after them, its gradient before theirs.

y (P, N) = d (P, K) · Wᵀ, with P = B · H · W pixels, K input and N output channels. Products of storage precision are
summed in float32. A program takes several tiles of pixels, so that few partial statistics are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xception_pl.kernels.ops.normalise import gradient_tile, load_row, merge, multiple, rows_of, tile_statistics
from xception_pl.kernels.tiles import aligned, programs, tile_for


@triton.jit
def source_rows(p, first, out_height, out_width, height, width, STRIDE: tl.constexpr):
    """Where the pixels that the rows `p` of the product read stand among the input's: a first row, and those from it.

    Only the first needs 64 bits; the tile is addressed from there in 32, which halves the registers of addresses.
    """
    if STRIDE == 1:
        return tl.cast(first, tl.int64), p - first
    size = out_height * out_width
    image = first // size
    rest = p - image * size  # counted from the tile's first image
    row = rest // size * height + rest % size // out_width * STRIDE
    return tl.cast(image, tl.int64) * height * width, row * width + rest % out_width * STRIDE


@triton.jit
def load_activated(x, table, source, valid, k, channels, NORM: tl.constexpr):
    """A tile of the input, (rows, channels `k`), as stored or, with NORM, ReLU(x · scale + shift) in the same precision."""
    inside = valid[:, None] & (k[None, :] < channels)
    tile = tl.load(x + (source[:, None] * channels + k[None, :]), mask=inside, other=0.0)
    if NORM:
        z = tile.to(tl.float32) * load_row(table, 0, k, channels)[None, :] + load_row(table, 1, k, channels)[None, :]
        tile = tl.where(inside & (z > 0), z, z * 0.0).to(tile.dtype)
    return tile


@triton.jit
def pointwise_kernel(
    x, table, weight, y, partial, rows, k_channels, n_channels, out_height, out_width, height, width, workers,
    NORM: tl.constexpr, STRIDE: tl.constexpr, STATISTICS: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y = activated x · Wᵀ, and (mean, M2) of each tile of M rows of y, as rounded: (tiles, 2, N)."""
    k_channels, n_channels = multiple(k_channels, ALIGN), multiple(n_channels, ALIGN)
    tiles_n = tl.cdiv(n_channels, N)
    worker = tl.program_id(0) // tiles_n  # neighbours in time share the rows that they read
    n = tl.program_id(0) % tiles_n * N + tl.arange(0, N)
    for tile in range(worker, tl.cdiv(rows, M), workers):
        first = tile * M
        p = first + tl.arange(0, M)
        start_row, source = source_rows(p, first, out_height, out_width, height, width, STRIDE)
        x_tile = x + start_row * k_channels
        total = tl.zeros((M, N), tl.float32)
        for start in range(0, k_channels, K):
            k = start + tl.arange(0, K)
            a = load_activated(x_tile, table, source, p < rows, k, k_channels, NORM)
            b = tl.load(
                weight + n[None, :] * k_channels + k[:, None],
                mask=(k < k_channels)[:, None] & (n < n_channels)[None, :],
                other=0.0,
            )
            total = tl.dot(a, b, total, input_precision=PRECISION)
        inside = (p < rows)[:, None] & (n < n_channels)[None, :]
        kept = total.to(y.dtype.element_ty)
        y_tile = y + tl.cast(first, tl.int64) * n_channels
        tl.store(y_tile + ((p - first)[:, None] * n_channels + n[None, :]), kept, mask=inside)
        if STATISTICS:
            # Merging tiles here would hold more per-channel values than there are registers beside the product.
            mean, m2 = tile_statistics(kept.to(tl.float32), p < rows, tl.minimum(rows - first, M))
            at = partial + tl.cast(tile, tl.int64) * 2 * n_channels + n
            tl.store(at, mean, mask=n < n_channels)
            tl.store(at + n_channels, m2, mask=n < n_channels)


@triton.jit
def pointwise_input_kernel(
    dz, y, table, weight, dx, dy, rows, k_channels, n_channels, workers,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dx = dy · W, where dy comes from dz and y by the backward table; the first tile of K also writes dy."""
    k_channels, n_channels = multiple(k_channels, ALIGN), multiple(n_channels, ALIGN)
    tiles_k = tl.cdiv(k_channels, K)
    worker = tl.program_id(0) // tiles_k
    tile_k = tl.program_id(0) % tiles_k
    k = tile_k * K + tl.arange(0, K)
    for tile in range(worker, tl.cdiv(rows, M), workers):
        first = tile * M
        p = first + tl.arange(0, M)
        shift = tl.cast(first, tl.int64) * n_channels
        total = tl.zeros((M, K), tl.float32)
        for start in range(0, n_channels, N):
            n = start + tl.arange(0, N)
            inside = (p < rows)[:, None] & (n < n_channels)[None, :]
            at = (p - first)[:, None] * n_channels + n[None, :]
            g = tl.load(dz + shift + at, mask=inside, other=0.0)
            stored = tl.load(y + shift + at, mask=inside, other=0.0)
            g = gradient_tile(g, stored, table, n, n_channels).to(dx.dtype.element_ty)
            tl.store(dy + shift + at, g, mask=inside & ((tl.zeros_like(n) + tile_k) == 0)[None, :])
            w = tl.load(
                weight + n[:, None] * k_channels + k[None, :],
                mask=(n < n_channels)[:, None] & (k < k_channels)[None, :],
                other=0.0,
            )
            total = tl.dot(g, w, total, input_precision=PRECISION)
        inside = (p < rows)[:, None] & (k < k_channels)[None, :]
        dx_tile = dx + tl.cast(first, tl.int64) * k_channels
        tl.store(dx_tile + ((p - first)[:, None] * k_channels + k[None, :]), total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def pointwise_weight_kernel(
    dy, x, table, partial, rows, k_channels, n_channels, out_height, out_width, height, width, splits,
    NORM: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dW = dyᵀ · activated x, in `splits` parts of the pixels, each summed for itself in float32: (splits, N, K)."""
    k_channels, n_channels = multiple(k_channels, ALIGN), multiple(n_channels, ALIGN)
    tiles_k = tl.cdiv(k_channels, K)
    n = tl.program_id(0) // tiles_k * N + tl.arange(0, N)
    k = tl.program_id(0) % tiles_k * K + tl.arange(0, K)
    split = tl.program_id(1)
    total = tl.zeros((N, K), tl.float32)
    for start in range(split * M, rows, splits * M):
        p = start + tl.arange(0, M)
        inside = (p < rows)[None, :] & (n < n_channels)[:, None]
        dy_tile = dy + tl.cast(start, tl.int64) * n_channels
        g = tl.load(dy_tile + ((p - start)[None, :] * n_channels + n[:, None]), mask=inside, other=0.0)
        start_row, source = source_rows(p, start, out_height, out_width, height, width, STRIDE)
        a = load_activated(x + start_row * k_channels, table, source, p < rows, k, k_channels, NORM)
        total = tl.dot(g, a, total, input_precision=PRECISION)
    at = partial + (split.to(tl.int64) * n_channels + n[:, None]) * k_channels + k[None, :]
    tl.store(at, total, mask=(n < n_channels)[:, None] & (k < k_channels)[None, :])


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: in TF32 only where torch.set_float32_matmul_precision allows it."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A 1 × 1 kernel (N, K, 1, 1) as the matrix (N, K) in the precision of the activations."""
    return weight.detach().reshape(weight.shape[0], -1).to(dtype).contiguous()


def pointwise(
    x: Tensor, weight: Tensor, *, table: Tensor | None = None, stride: int = 1, statistics: bool = True
) -> tuple[Tensor, Tensor]:
    """A 1 × 1 convolution with partial statistics of its output.

    Args:
        x: input (B, H, W, K).
        weight: (N, K, 1, 1).
        table: of a batch normalisation and ReLU that precede; None for neither.
        stride: 1 or 2.
        statistics: whether they are wanted; without, what is returned for them is empty.

    Returns:
        y (B, ⌈H / stride⌉, ⌈W / stride⌉, N) and the partial statistics (programs, 3, N).
    """
    images, height, width, k_channels = x.shape
    n_channels = weight.shape[0]
    out_height, out_width = -(-height // stride), -(-width // stride)
    y = x.new_empty(images, out_height, out_width, n_channels)
    chosen = tile_for("pointwise", f"{k_channels}x{n_channels}")
    tile = chosen.options
    rows, tiles_n = rows_of(y), triton.cdiv(n_channels, tile["N"])
    workers = programs(triton.cdiv(rows, tile["M"]), tiles_n, chosen.per_sm)
    partial = x.new_empty(triton.cdiv(rows, tile["M"]) if statistics else 0, 2, n_channels, dtype=torch.float32)
    pointwise_kernel[(workers * tiles_n,)](
        x, x if table is None else table, matrix(weight, x.dtype), y, partial,
        rows, k_channels, n_channels, out_height, out_width, height, width, workers,
        NORM=table is not None, STRIDE=stride, STATISTICS=statistics, PRECISION=precision(x.dtype),
        ALIGN=aligned(k_channels, n_channels), **tile,
    )  # fmt: skip
    return y, merge(partial, rows, tile["M"]) if statistics else partial


def pointwise_input(dz: Tensor, y: Tensor, table: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the input (B, H, W, K) and of the output y (B, H, W, N), from that of y's normalisation.

    Writing y's gradient costs one pass over memory here and saves one where the weight's gradient reads it.
    """
    n_channels, k_channels = weight.shape[:2]
    dx, dy = dz.new_empty(*dz.shape[:3], k_channels), torch.empty_like(dz)
    chosen = tile_for("pointwise_input", f"{k_channels}x{n_channels}")
    tile = chosen.options
    rows, tiles_k = rows_of(dz), triton.cdiv(k_channels, tile["K"])
    workers = programs(triton.cdiv(rows, tile["M"]), tiles_k, chosen.per_sm)
    pointwise_input_kernel[(workers * tiles_k,)](
        dz, y, table, matrix(weight, dz.dtype), dx, dy, rows, k_channels, n_channels, workers,
        PRECISION=precision(dz.dtype), ALIGN=aligned(k_channels, n_channels), **tile,
    )  # fmt: skip
    return dx, dy


def pointwise_weight(dy: Tensor, x: Tensor, *, table: Tensor | None = None, stride: int = 1) -> Tensor:
    """The gradient of the weight (N, K, 1, 1), float32, from that of the output y and the input as in `pointwise`."""
    _, height, width, k_channels = x.shape
    _, out_height, out_width, n_channels = dy.shape
    chosen = tile_for("pointwise_weight", f"{k_channels}x{n_channels}")
    tile = chosen.options
    rows = rows_of(dy)
    tiles = triton.cdiv(n_channels, tile["N"]) * triton.cdiv(k_channels, tile["K"])
    splits = programs(triton.cdiv(rows, tile["M"]), tiles, chosen.per_sm)
    partial = torch.empty(splits, n_channels, k_channels, dtype=torch.float32, device=x.device)
    pointwise_weight_kernel[(tiles, splits)](
        dy, x, x if table is None else table, partial,
        rows, k_channels, n_channels, out_height, out_width, height, width, splits,
        NORM=table is not None, STRIDE=stride, PRECISION=precision(x.dtype),
        ALIGN=aligned(k_channels, n_channels), **tile,
    )  # fmt: skip
    return partial.sum(0)[:, :, None, None]
