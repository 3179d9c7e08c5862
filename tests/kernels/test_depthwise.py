"""The depthwise convolution with what is fused into it, against autograd in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.conftest import DEVICE
from tests.kernels.reference import bounds, draw, error, nchw, nhwc, norm_layer, normalised, table_of
from xception_pl.kernels.ops.depthwise import depthwise, depthwise_backward


def check(
    batch: int,
    size: tuple[int, int],
    channels: int,
    dtype: torch.dtype,
    *,
    norm: bool = True,
    relu: bool = True,
    add: str = "none",
    again: bool = True,
) -> None:
    """Forward and all gradients. `add`: the shortcut's gradient, none, full, or strided; masked where there is a norm."""
    x = draw(batch, *size, channels, dtype=dtype, device=DEVICE)
    grad = draw(batch, *size, channels, dtype=dtype, device=DEVICE)
    weight = draw(channels, 1, 3, 3, dtype=torch.float32, device=DEVICE)
    layer = norm_layer(channels, DEVICE)
    table = table_of(x, layer) if norm else None
    half = tuple(-(-side // 2) for side in size)
    other = {"none": None, "full": size, "strided": half}[add]
    other = None if other is None else draw(batch, *other, channels, dtype=dtype, device=DEVICE)
    out = depthwise(x, table, weight, relu=relu)
    dx, sums, d_weight, out_again = depthwise_backward(
        grad, x, table, weight, relu=relu, add=other, add_masked=norm, again=again
    )

    z = normalised(x.double(), layer).detach() if norm else x.double()
    z.requires_grad_()
    exact_weight = weight.double().requires_grad_()
    a = z.relu() if relu else z
    expected = nhwc(F.conv2d(nchw(a), exact_weight, padding=1, groups=channels))
    loss = (expected * grad.double()).sum()
    if other is not None:
        read = a if norm else z  # what the shortcut reads: after the stem's ReLU, before the block's own
        loss = loss + (read[:, ::2, ::2] if add == "strided" else read).mul(other.double()).sum()
    loss.backward()
    assert error(out, expected) < bounds(dtype)
    assert (out_again is None) == (not again)
    if again:
        assert torch.equal(out, out_again)
    assert error(dx, z.grad) < bounds(dtype)
    assert error(d_weight, exact_weight.grad) < 5e-6
    if norm:
        mean = x.double().mean((0, 1, 2))
        assert error(sums.sum(0)[0], z.grad.sum((0, 1, 2))) < bounds(dtype)
        assert error(sums.sum(0)[1], (z.grad * (x.double() - mean)).sum((0, 1, 2))) < bounds(dtype)


@pytest.mark.usefixtures("set_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "what",
    [
        {},
        {"norm": False, "add": "full"},
        {"norm": False, "add": "strided", "again": False},
        {"norm": True, "add": "strided"},
        {"norm": False, "relu": False},
    ],
    ids=str,
)
def test_against_autograd(dtype: torch.dtype, what: dict[str, object]) -> None:
    check(2, (4, 7), 20, dtype, **what)


def test_seams_between_tiles(set_tiles: Callable[..., None]) -> None:
    set_tiles(COLUMNS=4, CHANNELS=16)
    check(2, (3, 6), 20, torch.float32)
    check(1, (4, 5), 20, torch.float32, norm=False, add="strided")


def test_a_single_pixel(set_tiles: Callable[..., None]) -> None:
    check(1, (1, 1), 16, torch.float32, norm=False)


def test_the_network_s_tail_of_channels(set_tiles: Callable[..., None]) -> None:
    set_tiles(COLUMNS=16, CHANNELS=512)
    check(1, (10, 10), 728, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "channels"), [(19, 728), (37, 256), (74, 128), (147, 64), (10, 2048)])
def test_the_network_s_sizes(size: int, channels: int, set_tiles: Callable[..., None]) -> None:
    """The widest maps with fewer rows where it is the interpreter that walks down them, one after the other."""
    set_tiles(COLUMNS=64 if size > 32 else 32, CHANNELS=2048)
    height = size if DEVICE == "cuda" else min(size, 20 - size % 2)
    check(1, (height, size), channels, torch.float16)


def test_the_same_bits_each_time(set_tiles: Callable[..., None]) -> None:
    x, grad = (draw(3, 5, 5, 16, dtype=torch.float32, device=DEVICE) for _ in range(2))
    weight = draw(16, 1, 3, 3, dtype=torch.float32, device=DEVICE)

    def found() -> list[Tensor]:
        dx, _, d_weight, out = depthwise_backward(grad, x, None, weight, relu=True)
        return [dx, d_weight, out]

    assert all(torch.equal(a, b) for a, b in zip(found(), found(), strict=True))
