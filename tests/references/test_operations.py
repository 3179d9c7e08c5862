"""Optimisers, averaging, schedule, L2 and losses against stored results of TensorFlow's own operations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from xception_pl.optim.averaging import PolyakAverage
from xception_pl.optim.config import OptimConfig
from xception_pl.optim.create import create_optimizer
from xception_pl.optim.losses import loss_function
from xception_pl.optim.schedules import learning_rate

STORED: dict[str, Any] = json.loads(Path(__file__).with_name("tensorflow_ops.json").read_text())


def holder(start: list[float]) -> nn.Module:
    """A network of one vector."""
    network = nn.Module()
    network.weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    return network


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("operation", "config"),
    [
        ("momentum", OptimConfig(momentum=0.9, l2=0.0)),
        ("nesterov", OptimConfig(momentum=0.9, nesterov=True, l2=0.0)),
        ("rmsprop_eps_1", OptimConfig(name="rmsprop", momentum=0.9, rho=0.8, eps=1.0, l2=0.0)),
        ("rmsprop_eps_small", OptimConfig(name="rmsprop", momentum=0.9, rho=0.8, eps=1.0e-3, l2=0.0)),
    ],
)
def test_optimiser_is_tensorflows_while_the_rate_falls(operation: str, config: OptimConfig, foreach: bool) -> None:
    stored = STORED[operation]
    network = holder(stored["start"])
    optimizer = create_optimizer(config, network)
    for rate, gradient, expected in zip(stored["learning_rates"], stored["gradients"], stored["weights"], strict=True):
        for group in optimizer.param_groups:
            group["lr"], group["foreach"] = rate, foreach
        network.weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        assert network.weight.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-15)


def test_pytorchs_own_rmsprop_would_not_pass() -> None:
    stored = STORED["rmsprop_eps_small"]
    network = holder(stored["start"])
    optimizer = torch.optim.RMSprop(network.parameters(), lr=0.1, alpha=0.8, momentum=0.9, eps=1.0e-3)
    network.weight.grad = torch.tensor(stored["gradients"][0], dtype=torch.float64)
    optimizer.step()
    assert network.weight.tolist() != pytest.approx(stored["weights"][0], rel=1e-2)


@pytest.mark.parametrize("operation", ["averaging_early", "averaging_capped"])
def test_averaging_is_tensorflows(operation: str) -> None:
    stored = STORED[operation]
    network = holder(stored["start"])
    average = PolyakAverage(network, stored["decay"])
    for value, expected in zip(stored["values"], stored["averages"], strict=True):
        network.weight.data = torch.tensor(value, dtype=torch.float64)
        average.update(network)
        # TensorFlow computes the decay in float32, ours is exact.
        assert average.network.weight.tolist() == pytest.approx(expected, rel=0, abs=1e-6)


def test_staircase_is_tensorflows() -> None:
    stored = STORED["staircase"]
    config = OptimConfig(lr=stored["learning_rate"], decay_rate=stored["decay_rate"], decay_every_epochs=2.0)
    rates = [
        learning_rate(config, step, images_per_epoch=1281167, global_batch=256, total_steps=0)
        for step in stored["steps"]
    ]
    assert stored["decay_steps"] == int(1281167 / 256 * 2)
    assert rates == pytest.approx(stored["rates"], rel=1e-12)


@pytest.mark.parametrize(("sense", "whose"), [("torch", "slim"), ("keras", "keras")])
def test_l2_pulls_as_hard_as_in_the_library_it_is_named_for(sense: Any, whose: str) -> None:
    stored = STORED["penalties"]
    network = holder(stored["weight"])
    config = OptimConfig(lr=1.0, momentum=0.0, l2=stored["strength"], l2_sense=sense, l2_on="all")
    optimizer = create_optimizer(config, network)
    before = network.weight.detach().clone()
    network.weight.grad = torch.zeros_like(before)
    optimizer.step()
    assert (before - network.weight).tolist() == pytest.approx(stored[whose], rel=1e-14)


def test_smoothed_cross_entropy_is_keras() -> None:
    stored = STORED["losses"]
    loss = loss_function(OptimConfig(label_smoothing=stored["label_smoothing"]))
    logits, labels = torch.tensor(stored["logits"], dtype=torch.float64), torch.tensor(stored["labels"])
    assert loss(logits, labels).item() == pytest.approx(stored["cross_entropy"], rel=1e-12)
    as_probabilities = torch.nn.functional.one_hot(labels, 5).double()
    assert loss(logits, as_probabilities).item() == pytest.approx(stored["cross_entropy"], rel=1e-12)


def test_sigmoid_loss_sums_tensorflows_terms_over_classes() -> None:
    stored = STORED["losses"]
    loss = loss_function(OptimConfig(loss="sigmoid"))
    logits, sets = torch.tensor(stored["logits"], dtype=torch.float64), torch.tensor(stored["label_sets"])
    expected = sum(sum(image) for image in stored["sigmoid_terms"]) / 3
    assert loss(logits, sets).item() == pytest.approx(expected, rel=1e-12)
