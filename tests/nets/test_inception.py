"""The modules of Figures 1 to 4 and what the paper says of them."""

import pytest
import torch
from torch import Tensor, nn

from xception_pl.nets.inception import (
    ExtremeInceptionModule,
    GroupedInceptionModule,
    InceptionModule,
    SimplifiedInceptionModule,
)


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Batch norms away from their identity, so that an equality says something about them."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                assert tensor is not None
                tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


def gradients(module: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its weighted sum by the input."""
    x = x.clone().requires_grad_()
    y = module(x)
    (y * weight).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_inception_module_concatenates_its_four_towers() -> None:
    module = InceptionModule(16, tower_1x1=4, tower_3x3=(3, 6), tower_3x3_3x3=(3, 5, 7), tower_pool=2).eval()
    x = torch.randn(2, 16, 9, 8)
    y = module(x)
    assert y.shape == (2, 4 + 6 + 7 + 2, 9, 8)
    assert torch.equal(y[:, :4], module.tower_1x1(x))
    assert torch.equal(y[:, 4:10], module.tower_3x3(x))
    assert torch.equal(y[:, 10:17], module.tower_3x3_3x3(x))
    assert torch.equal(y[:, 17:], module.tower_pool(x))


@pytest.mark.parametrize(
    ("tower", "reach"), [("tower_1x1", 0), ("tower_3x3", 1), ("tower_3x3_3x3", 2), ("tower_pool", 1)]
)
def test_inception_towers_see_as_far_as_figure_1_draws(tower: str, reach: int) -> None:
    module = InceptionModule(4, tower_1x1=4, tower_3x3=(4, 4), tower_3x3_3x3=(4, 4, 4), tower_pool=4).eval()
    for name, weight in module.named_parameters():
        if "conv" in name:
            weight.data.abs_()  # nothing cancels and no ReLU is shut
    x = torch.ones(1, 4, 9, 9, requires_grad=True)
    module.get_submodule(tower)(x)[:, :, 4, 4].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 1)) > 0
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[4 - reach : 5 + reach, 4 - reach : 5 + reach] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("towers", [1, 3, 4])
def test_figures_2_and_3_are_strictly_equivalent(towers: int, training: bool) -> None:
    simplified = SimplifiedInceptionModule(10, 24, 36, towers=towers)
    randomize(simplified)
    simplified.train(training)
    grouped = GroupedInceptionModule.from_simplified(simplified)
    x, weight = torch.randn(3, 10, 8, 7), torch.randn(3, 36, 8, 7)

    (y, gradient), (expected, expected_gradient) = gradients(grouped, x, weight), gradients(simplified, x, weight)

    assert relative_error(y, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 1e-6
    assert sum(p.numel() for p in grouped.parameters()) == sum(p.numel() for p in simplified.parameters())
    for part, unit in ((0, grouped.pointwise), (1, grouped.spatial)):
        for name, value in unit.named_parameters():
            towers_gradient = torch.cat([tower[part].get_parameter(name).grad for tower in simplified.towers])
            assert relative_error(value.grad, towers_gradient) < 1e-6, name
        assert unit.bn.running_mean is not None
        statistics = torch.cat([tower[part].bn.running_mean for tower in simplified.towers])
        assert relative_error(unit.bn.running_mean, statistics) < 1e-6


def test_the_grouped_module_does_not_share_its_weights() -> None:
    simplified = SimplifiedInceptionModule(4, 6, 6)
    grouped = GroupedInceptionModule.from_simplified(simplified)
    before = grouped.pointwise.conv.weight.clone()
    simplified.towers[0][0].conv.weight.data.zero_()
    assert torch.equal(grouped.pointwise.conv.weight, before)


def test_the_extreme_module_is_the_grouped_one_with_a_group_a_channel() -> None:
    extreme, grouped = ExtremeInceptionModule(5, 12), GroupedInceptionModule(5, 12, 12, groups=12)
    grouped.load_state_dict(extreme.state_dict())
    x = torch.randn(2, 5, 6, 6)
    assert torch.equal(extreme(x), grouped(x))
    assert extreme.spatial.conv.weight.shape == (12, 1, 3, 3)


def test_worked_example_36_channels_in_3_groups_to_18() -> None:
    module = GroupedInceptionModule(8, 36, 18, groups=3).eval()
    convolution = module.spatial.conv
    assert [tuple(kernel.shape) for kernel in convolution.weight.chunk(3)] == [(6, 12, 3, 3)] * 3

    reached = torch.zeros(18, 36, dtype=torch.bool)
    for output in range(18):
        x = torch.randn(1, 36, 5, 5, requires_grad=True)
        convolution(x)[:, output].sum().backward()
        assert x.grad is not None
        reached[output] = x.grad.abs().sum((0, 2, 3)) > 0
    expected = torch.block_diag(*[torch.ones(6, 12)] * 3).bool()
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("make", [SimplifiedInceptionModule, GroupedInceptionModule])
def test_towers_that_do_not_divide_are_refused(make: type) -> None:
    with pytest.raises(
        ValueError, match=r"=3 does not divide both mid_channels=36 and out_channels=20: use a divisor of 4$"
    ):
        make(8, 36, 20)
