"""Which parameters the optimiser gets, what L2 does to each, and the optimisers' own steps."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from xception_pl.nets.xception import Xception
from xception_pl.optim.config import OptimConfig
from xception_pl.optim.create import create_optimizer, parameter_groups


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
    )


def named(network: nn.Module, group: dict[str, Any]) -> set[str]:
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


def test_l2_on_kernels_touches_kernels_alone() -> None:
    network = small_network()
    shrunk, left = parameter_groups(network, OptimConfig())
    assert named(network, shrunk) == {"0.weight", "1.weight", "4.weight"}
    assert named(network, left) == {"0.bias", "1.bias", "2.weight", "2.bias", "4.bias"}
    assert (shrunk["weight_decay"], left["weight_decay"]) == (1.0e-5, 0.0)


def test_l2_on_all_touches_all() -> None:
    network = small_network()
    (group,) = parameter_groups(network, OptimConfig(l2_on="all"))
    assert named(network, group) == {name for name, _ in network.named_parameters()}


def test_keras_sense_is_twice_as_strong() -> None:
    assert parameter_groups(small_network(), OptimConfig(l2_sense="keras"))[0]["weight_decay"] == 2.0e-5


@pytest.mark.parametrize("l2_on", ["kernels", "all"])
def test_each_trainable_parameter_of_xception_is_in_one_group(l2_on: Any) -> None:
    with torch.device("meta"):
        network = Xception()
    network.block1.requires_grad_(False)
    groups = parameter_groups(network, OptimConfig(l2_on=l2_on))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert len(set(grouped)) == len(grouped)


def test_l2_on_kernels_of_xception_counts() -> None:
    """34 depthwise, 34 pointwise, 2 stem, 4 shortcut and 1 dense kernels; the rest: 40 batch norms and a bias."""
    with torch.device("meta"):
        network = Xception()
    shrunk, left = parameter_groups(network, OptimConfig())
    assert (len(shrunk["params"]), len(left["params"])) == (34 + 34 + 2 + 4 + 1, 2 * 40 + 1)
    assert sum(p.numel() for g in (shrunk, left) for p in g["params"]) == 22_855_952


def test_a_shared_parameter_is_in_one_group_once() -> None:
    network = small_network()
    network.append(network[4])
    groups = parameter_groups(network, OptimConfig())
    assert sum(len(group["params"]) for group in groups) == 8


def test_the_groups_do_not_change_with_the_strength() -> None:
    """So that a run resumes with another one."""
    network = small_network()
    with_l2, without = (create_optimizer(OptimConfig(l2=l2), network) for l2 in (1.0e-5, 0.0))
    without.load_state_dict(with_l2.state_dict())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        create_optimizer(OptimConfig(), small_network().requires_grad_(False))


@pytest.mark.parametrize("sense", ["torch", "keras"])
@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_l2_is_the_gradient_of_its_penalty(name: Any, sense: Any) -> None:
    """A step with weight decay equals a step on the loss plus the written-out penalty."""
    config = OptimConfig(name=name, lr=0.1, l2=0.03, l2_sense=sense)
    by_optimizer, by_loss = small_network().double(), small_network().double()
    images = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    ours = create_optimizer(config, by_optimizer)
    plain = create_optimizer(OptimConfig(name=name, lr=0.1, l2=0.0), by_loss)
    for _ in range(3):
        ours.zero_grad()
        by_optimizer(images).square().mean().backward()
        ours.step()
        plain.zero_grad()
        squares = sum(p.square().sum() for p in by_loss.parameters() if p.ndim >= 2)
        (by_loss(images).square().mean() + (0.03 if sense == "keras" else 0.015) * squares).backward()
        plain.step()
    for left, right in zip(by_optimizer.parameters(), by_loss.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def test_sgd_settings_arrive() -> None:
    optimizer = create_optimizer(OptimConfig(lr=0.2, momentum=0.8, nesterov=True), small_network())
    assert isinstance(optimizer, SGD)
    assert all((g["lr"], g["momentum"], g["nesterov"]) == (0.2, 0.8, True) for g in optimizer.param_groups)


def test_rmsprop_is_tensorflows_formula_step_by_step() -> None:
    """The mean square starts at 1, eps is inside the root, the rate inside the momentum: none of it is PyTorch's."""
    rates, rho, momentum, eps = [0.1, 0.1, 0.02, 0.02], 0.7, 0.9, 1.0e-2
    weight = nn.Parameter(torch.tensor([[0.5, -1.5]], dtype=torch.float64))
    network = nn.Module()
    network.weight = weight
    optimizer = create_optimizer(OptimConfig(name="rmsprop", rho=rho, momentum=momentum, eps=eps, l2=0.0), network)
    expected, mean_square, moving = [0.5, -1.5], [1.0, 1.0], [0.0, 0.0]
    for step, rate in enumerate(rates):
        gradient = [0.3 + step, -2.0 * step]
        for i, g in enumerate(gradient):
            mean_square[i] = rho * mean_square[i] + (1 - rho) * g * g
            moving[i] = momentum * moving[i] + rate * g / (mean_square[i] + eps) ** 0.5
            expected[i] -= moving[i]
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert weight[0].tolist() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_the_optimiser_resumes_exactly(name: Any) -> None:
    images = torch.randn(6, 3, 5, 5)

    def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()

    config, whole = OptimConfig(name=name, lr=0.01), small_network()
    optimizer = create_optimizer(config, whole)
    train(whole, optimizer, 2)
    resumed, state = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, 2)
    again = create_optimizer(config, resumed)
    again.load_state_dict(state)
    train(resumed, again, 2)
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_layer_decay_is_timms() -> None:
    """The rate's factor of each parameter, against timm's own grouping."""
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        network = Xception(width=0.125, middle_blocks=2, fc_units=(16,))
    names = {parameter: name for name, parameter in network.named_parameters()}

    def scales(groups: list[dict[str, Any]]) -> dict[str, float]:
        return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}

    ours = scales(parameter_groups(network, OptimConfig(layer_decay=0.7)))
    assert ours == pytest.approx(scales(param_groups_layer_decay(network, layer_decay=0.7)), rel=1e-12)
    assert ours["fc.weight"] == ours["fc_layers.0.bias"] == 1.0
    assert ours["block8.bn1.weight"] == pytest.approx(0.7)
    assert ours["block1.conv1.weight"] == pytest.approx(0.7**8)


def test_without_layer_decay_all_learn_alike() -> None:
    assert [group["lr_scale"] for group in parameter_groups(small_network(), OptimConfig())] == [1.0, 1.0]


def test_layer_decay_needs_depths() -> None:
    with pytest.raises(ValueError, match=r"optim\.layer_decay"):
        parameter_groups(small_network(), OptimConfig(layer_decay=0.5))


def test_frozen_blocks_do_not_shift_the_depths() -> None:
    with torch.device("meta"):
        network = Xception(width=0.125, middle_blocks=0)
    network.block1.requires_grad_(False)
    groups = {group["name"]: group["lr_scale"] for group in parameter_groups(network, OptimConfig(layer_decay=0.5))}
    assert groups["l2.6"] == 1.0
    assert groups["no_l2.1"] == 0.5**5
    assert "l2.0" not in groups
