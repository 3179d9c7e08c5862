"""Pooling and shortcut at the end of a block, against autograd in float64."""

from collections.abc import Callable

import pytest
import torch

from tests.kernels.conftest import DEVICE
from tests.kernels.reference import bounds, draw, error, nchw, nhwc, norm_layer, normalised, table_of
from xception_pl.kernels.ops.join import pool, pool_backward
from xception_pl.nets.xception import same_max_pool


def check(batch: int, size: tuple[int, int], channels: int, dtype: torch.dtype, *, shortcut: bool = True) -> None:
    y = draw(batch, *size, channels, dtype=dtype, device=DEVICE)
    half = tuple(-(-side // 2) for side in size)
    side = draw(batch, *half, channels, dtype=dtype, device=DEVICE)
    grad = draw(batch, *half, channels, dtype=dtype, device=DEVICE)
    layer, side_layer = norm_layer(channels, DEVICE), norm_layer(channels, DEVICE)
    table, side_table = table_of(y, layer), table_of(side, side_layer)
    given = (side, side_table) if shortcut else ()
    out = pool(y, table, *given)
    dz, sums, side_sums = pool_backward(grad, y, table, *given)

    z = normalised(y.double(), layer).detach().requires_grad_()
    pooled = nhwc(same_max_pool(nchw(z), 2))
    expected = pooled + normalised(side.double(), side_layer) if shortcut else pooled
    pooled.backward(grad.double())
    assert error(out, expected) < bounds(dtype)
    assert error(dz, z.grad) < bounds(dtype)
    pairs = [(sums, z.grad, y)]
    if shortcut:
        pairs.append((side_sums, grad.double(), side))
    for found, of, over in pairs:
        mean = over.double().mean((0, 1, 2))
        assert error(found.sum(0)[0], of.sum((0, 1, 2))) < bounds(dtype)
        assert error(found.sum(0)[1], (of * (over.double() - mean)).sum((0, 1, 2))) < bounds(dtype)


@pytest.mark.usefixtures("set_tiles")
@pytest.mark.parametrize(("size", "shortcut"), [((5, 5), True), ((6, 6), False), ((5, 6), False), ((6, 5), True)])
def test_windows_of_even_and_odd_sizes(size: tuple[int, int], shortcut: bool) -> None:
    check(2, size, 20, torch.float32, shortcut=shortcut)


def test_seams_between_tiles(set_tiles: Callable[..., None]) -> None:
    set_tiles(COLUMNS=2, CHANNELS=16)
    check(2, (3, 7), 20, torch.float16)


def test_of_equal_values_the_first_gets_the_gradient(set_tiles: Callable[..., None]) -> None:
    """Few different values, so that nearly every window has ties; and a scale of 0, which makes all of them ties."""
    y = torch.randint(0, 3, (2, 7, 6, 16)).float().to(DEVICE)
    grad = draw(2, 4, 3, 16, dtype=torch.float32, device=DEVICE)
    layer = norm_layer(16, DEVICE)
    table = table_of(y, layer)
    dz, _, _ = pool_backward(grad, y, table)
    z = (y * table[0] + table[1]).requires_grad_()
    nhwc(same_max_pool(nchw(z), 2)).backward(grad)
    torch.testing.assert_close(dz, z.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "channels"), [(19, 1024), (37, 728), (74, 256), (147, 128)])
def test_the_network_s_sizes(size: int, channels: int, set_tiles: Callable[..., None]) -> None:
    """The widest maps with fewer rows where it is the interpreter that walks down them, one after the other."""
    set_tiles(COLUMNS=32, CHANNELS=1024)
    height = size if DEVICE == "cuda" else min(size, 20 - size % 2)
    check(1, (height, size), channels, torch.float16)
