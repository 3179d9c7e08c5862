"""Batch normalisation in parts, against nn.BatchNorm2d in float64."""

import copy

import pytest
import torch
from torch import nn

from tests.kernels.conftest import DEVICE
from tests.kernels.reference import bounds, draw, error, nchw, norm_layer, normalised, table_of
from xception_pl.kernels.ops import normalise

DTYPES = [torch.float32, torch.float16]
SHAPES = [(3, 10, 10, 32), (2, 7, 5, 20)]
pytestmark = pytest.mark.usefixtures("set_tiles")


@pytest.mark.parametrize("momentum", [0.01, None])
def test_statistics_are_those_of_batch_norm(momentum: float | None) -> None:
    y = draw(3, 10, 10, 24, dtype=torch.float32, device=DEVICE) * 3 + 100  # far from 0: no digits may cancel
    layer = norm_layer(24, DEVICE)
    layer.momentum = momentum
    plain = copy.deepcopy(layer).double().train()
    for batch in (y, y.flip(0) * 0.5):
        table = table_of(batch, layer)
        plain(nchw(batch.double()))
    torch.testing.assert_close(layer.running_mean.double(), plain.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), plain.running_var, rtol=1e-5, atol=1e-6)
    assert layer.num_batches_tracked == 2
    values = batch.double().reshape(-1, 24)
    torch.testing.assert_close(table[normalise.MEAN].double(), values.mean(0), rtol=1e-6, atol=0)
    rstd = (values.var(0, unbiased=False) + 1e-3).rsqrt()
    torch.testing.assert_close(table[normalise.RSTD].double(), rstd, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_forward_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, relu: bool) -> None:
    y, grad = draw(*shape, dtype=dtype, device=DEVICE), draw(*shape, dtype=dtype, device=DEVICE)
    residual = None if relu else draw(*shape, dtype=dtype, device=DEVICE)
    layer = norm_layer(shape[-1], DEVICE)
    table = table_of(y, layer)
    out = normalise.apply(y, table, relu=relu, residual=residual)
    dz, sums = normalise.sums(grad, y, table, relu=relu)
    backward, d_weight, d_bias = normalise.gradient_table(sums, table, layer)
    dy = normalise.gradient(dz, y, backward)

    exact = y.double().requires_grad_()
    z = normalised(exact, layer)
    expected = z.relu() if relu else z + residual
    expected.backward(grad.double())
    assert error(out, expected) < bounds(dtype)
    assert error(dy, exact.grad) < 2 * bounds(dtype)  # dz is rounded too
    assert error(d_weight, layer.weight.grad) < bounds(dtype)
    assert error(d_bias, layer.bias.grad) < bounds(dtype)


def test_a_nan_is_passed_on() -> None:
    y = draw(1, 4, 4, 16, dtype=torch.float32, device=DEVICE)
    y[0, 1, 1, 3] = torch.nan
    out = normalise.apply(y, table_of(y, norm_layer(16, DEVICE)), relu=True)
    assert out[..., 3].isnan().all()
    assert not out[..., 4].isnan().any()


def test_a_layer_without_running_statistics() -> None:
    layer = nn.BatchNorm2d(16, track_running_stats=False).to(DEVICE)
    y = draw(2, 4, 4, 16, dtype=torch.float32, device=DEVICE)
    torch.testing.assert_close(normalise.apply(y, table_of(y, layer)), nhwc_of(layer, y), rtol=1e-5, atol=1e-5)


def nhwc_of(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    return layer(nchw(y)).permute(0, 2, 3, 1)
