"""The 1 × 1 convolutions with what is fused into them, against autograd in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.conftest import DEVICE
from tests.kernels.reference import bounds, draw, error, nchw, nhwc, norm_layer, normalised, table_of
from xception_pl.kernels.ops import normalise
from xception_pl.kernels.ops.pointwise import pointwise, pointwise_input, pointwise_weight


def check(
    batch: int,
    size: tuple[int, int],
    channels: tuple[int, int],
    dtype: torch.dtype,
    *,
    stride: int = 1,
    norm: bool = False,
) -> None:
    """y and its statistics; from a gradient after y's own batch norm, those of input and weight."""
    x = draw(batch, *size, channels[0], dtype=dtype, device=DEVICE)
    weight = (draw(channels[1], channels[0], 1, 1, dtype=dtype, device=DEVICE) / channels[0] ** 0.5).float()
    before, after = norm_layer(channels[0], DEVICE), norm_layer(channels[1], DEVICE)
    table = table_of(x, before) if norm else None
    y, partial = pointwise(x, weight, table=table, stride=stride)

    a = normalised(x.double(), before).relu().detach() if norm else x.double()
    a.requires_grad_()
    exact_weight = weight.to(dtype).double().requires_grad_()
    expected = nhwc(F.conv2d(nchw(a), exact_weight, stride=stride))
    bound = bounds(dtype) * (2 if norm else 1)  # the activated input is rounded as well
    assert y.shape == expected.shape
    assert error(y, expected) < bound
    own = normalise.finish(partial, after)
    values = y.double().reshape(-1, channels[1])
    assert error(own[normalise.MEAN], values.mean(0)) < 1e-5
    assert error(own[normalise.RSTD], (values.var(0, unbiased=False) + 1e-3).rsqrt()) < 1e-5

    grad = draw(*y.shape, dtype=dtype, device=DEVICE)
    _, sums = normalise.sums(grad, y, own)
    backward, _, _ = normalise.gradient_table(sums, own, after)
    dx, dy = pointwise_input(grad, y, backward, weight)
    d_weight = pointwise_weight(dy, x, table=table, stride=stride)
    leaf = y.double().requires_grad_()
    normalised(leaf, after).backward(grad.double())
    expected.backward(dy.double())
    assert error(dy, leaf.grad) < bounds(dtype)
    exact = a.grad[:, ::stride, ::stride]
    assert error(dx, exact) < bounds(dtype)
    assert error(d_weight, exact_weight.grad) < (bound if norm else 5e-6)


@pytest.mark.usefixtures("set_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("stride", "norm"), [(1, False), (2, False), (2, True)])
def test_against_autograd(dtype: torch.dtype, stride: int, norm: bool) -> None:
    check(3, (5, 9), (20, 40), dtype, stride=stride, norm=norm)


def test_several_tiles_a_worker(set_tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(M=16)
    monkeypatch.setattr("xception_pl.kernels.tiles.MULTIPROCESSORS", 4)
    check(3, (5, 9), (36, 20), torch.float32)


def test_statistics_far_from_zero(set_tiles: Callable[..., None]) -> None:
    x = draw(2, 8, 8, 16, dtype=torch.float32, device=DEVICE) + 100
    weight = torch.ones(16, 16, 1, 1, device=DEVICE)
    y, partial = pointwise(x, weight)
    table = normalise.finish(partial, norm_layer(16, DEVICE))
    var = y.double().reshape(-1, 16).var(0, unbiased=False)
    assert error(table[normalise.RSTD], (var + 1e-3).rsqrt()) < 1e-5


@pytest.mark.parametrize("channels", [(728, 64), (64, 728)])
def test_the_network_s_tail_of_channels(channels: tuple[int, int], set_tiles: Callable[..., None]) -> None:
    set_tiles(M=64, N=64, K=64)
    check(1, (10, 10), channels, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "channels"),
    [(147, (64, 128)), (74, (128, 256)), (37, (256, 728)), (19, (728, 728)), (10, (1536, 2048))],
)
def test_the_network_s_sizes(size: int, channels: tuple[int, int], set_tiles: Callable[..., None]) -> None:
    set_tiles(M=1024, N=512, K=256)
    check(1, (size, size), channels, torch.float16)
