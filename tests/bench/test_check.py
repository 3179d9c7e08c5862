"""The float64 reference is the network's own arithmetic, and what differs from it is found."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xception_pl.bench.check import ExactConv2d, Outcome, errors, exact, verdict
from xception_pl.bench.contender import TorchInference, TorchTraining
from xception_pl.bench.peers import timm_names, timm_network
from xception_pl.bench.task import Task
from xception_pl.nets.xception import Xception


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 4, 1, stride=2, bias=False),
        nn.Conv2d(3, 5, 3, stride=2, bias=False),
        nn.Conv2d(3, 5, 3, bias=False),
    ],
    ids=["depthwise", "shortcut", "first", "second"],
)
@pytest.mark.parametrize("size", [7, 8])
def test_exact_convolutions(conv: nn.Conv2d, size: int) -> None:
    x = torch.randn(2, conv.in_channels, size, size, dtype=torch.float64)
    torch.testing.assert_close(ExactConv2d(conv.double())(x), conv(x), rtol=1e-12, atol=1e-12)


def test_reference_of_inference_is_the_network_in_float64(inference: Task, exact_inference: Outcome) -> None:
    with torch.inference_mode():
        logits = inference.network().double()(inference.images.double())
    torch.testing.assert_close(exact_inference["logits"], logits, rtol=1e-9, atol=1e-9)


def test_reference_of_training_is_the_networks_step(training: Task, exact_training: Outcome) -> None:
    reference, network = exact_training, training.network()
    assert list(reference) == ["loss", *(name for name, _ in network.named_parameters())]
    loss = F.cross_entropy(network(training.images), training.labels)
    assert float(reference["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_timm_is_the_same_network(inference: Task, exact_inference: Outcome) -> None:
    """At an even and at odd feature maps, exactly: the name map, epsilon and padding are right."""
    assert sorted(timm_names().values()) == sorted(Xception().state_dict())
    theirs = timm_network(inference).double()
    with torch.inference_mode():
        logits = theirs(inference.images.double())
    torch.testing.assert_close(exact_inference["logits"], logits, rtol=1e-9, atol=1e-9)


def test_timm_with_its_own_numerics_is_disqualified(inference: Task, exact_inference: Outcome) -> None:
    for kind, setting in (
        (nn.BatchNorm2d, {"eps": 1e-5}),
        (nn.MaxPool2d, {"padding": 1, "ceil_mode": False}),
    ):
        network = timm_network(inference)
        for module in network.modules():
            if isinstance(module, kind):
                vars(module).update(setting)
        outcome = TorchInference(network, inference, channels_last=False).outcome()
        _, wrong = verdict(errors(outcome, exact_inference))
        assert wrong is not None
        assert "logits is off by" in wrong


def test_gradients_are_compared_one_by_one(training: Task, exact_training: Outcome) -> None:
    outcome = TorchTraining(training.network(), training, channels_last=True).outcome()
    typical, wrong = verdict(errors(outcome, exact_training))
    assert wrong is None
    assert typical < 1e-2
    outcome["block9.bn2.bias"] = outcome["block9.bn2.bias"].flip(0)
    _, wrong = verdict(errors(outcome, exact_training))
    assert wrong is not None
    assert wrong.startswith("block9.bn2.bias is off by")


def test_timm_trains_with_the_same_gradients(training: Task, exact_training: Outcome) -> None:
    runner = TorchTraining(timm_network(training), training, channels_last=False, names=timm_names())
    _, wrong = verdict(errors(runner.outcome(), exact_training))
    assert wrong is None


def test_an_error_in_all_gradients_is_found_though_each_is_small() -> None:
    found = {"loss": 1e-6} | {f"block{n}": 0.03 for n in range(9)}
    assert verdict(found)[1] == "half of the gradients are off by 0.03, more than 0.02"
    assert verdict(found, plain=dict.fromkeys(found, 0.016))[1] is None


def test_verdict_refuses_nan_and_lets_low_precision_double_the_plain_error() -> None:
    assert verdict({"logits": math.nan})[1] is not None
    assert verdict({"logits": 0.05})[1] == "logits is off by 0.05, more than 0.0001"
    assert verdict({"logits": 0.05}, plain={"logits": 0.03})[1] is None
    assert verdict({"logits": 0.07}, plain={"logits": 0.03})[1] == "logits is off by 0.07, more than 0.06"


def test_what_is_missing_or_misshapen_is_named() -> None:
    reference = {"loss": torch.zeros(()), "fc.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"gives no fc\.bias"):
        errors({"loss": torch.zeros(())}, reference)
    with pytest.raises(ValueError, match=r"gives fc\.bias of shape \(2,\) instead of \(3,\)"):
        errors({"loss": torch.zeros(()), "fc.bias": torch.ones(2)}, reference)


@pytest.mark.slow
def test_bfloat16_is_measured_against_plain_bfloat16(inference: Task) -> None:
    task = replace(inference, precision="bf16")
    plain = errors(TorchInference(task.network(), task, channels_last=False).outcome(), exact(task))
    assert 1e-3 < plain["logits"] < 1
    other = errors(TorchInference(task.network(), task, channels_last=True).outcome(), exact(task))
    assert verdict(other)[1] is not None
    assert verdict(other, plain)[1] is None
