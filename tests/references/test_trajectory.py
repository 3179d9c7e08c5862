"""Ten training steps as Keras' own Xception on TensorFlow makes them: network, gradients and training agree.

In float64, because rounding grows by orders of magnitude in ten steps. Keras' numbers are stored; the script that made
them is scripts/references/make_tensorflow_references.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.references import seeded
from xception_pl.nets.xception import Xception
from xception_pl.optim.config import OptimConfig
from xception_pl.optim.create import create_optimizer
from xception_pl.optim.losses import loss_function

REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("xception_trajectory.json").read_text())


def keras_layer(path: str) -> str:
    """`block2.sepconv1.depthwise` is `block2_sepconv1` in Keras, `block2.bn1` is `block2_sepconv1_bn`."""
    if path == "fc":
        return "predictions"
    block, layer, *_ = path.split(".")
    if layer.startswith("bn"):
        layer = f"{'conv' if block == 'block1' else 'sepconv'}{layer[2:]}_bn"
    return f"{block}_{layer}"


def in_keras_terms(network: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics by Keras name, as views in Keras' axes: to write to one is to write to the network."""
    views: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        match module:
            case nn.BatchNorm2d():
                layer = keras_layer(path)
                views |= {f"{layer}/gamma": module.weight, f"{layer}/beta": module.bias}
                views |= {f"{layer}/moving_mean": module.running_mean, f"{layer}/moving_variance": module.running_var}
            case nn.Conv2d() if path.endswith("depthwise"):
                views[f"{keras_layer(path)}/depthwise_kernel"] = module.weight.permute(2, 3, 0, 1)
            case nn.Conv2d():
                kind = "pointwise_kernel" if path.endswith("pointwise") else "kernel"
                views[f"{keras_layer(path)}/{kind}"] = module.weight.permute(2, 3, 1, 0)
            case nn.Linear():
                views |= {f"{keras_layer(path)}/kernel": module.weight.T, f"{keras_layer(path)}/bias": module.bias}
    return {name: view.detach() for name, view in views.items()}


@dataclass
class Run:
    losses: list[float]
    """Cross-entropy and L2 penalty together, before each step."""
    weights: dict[str, seeded.Array]
    """After the last step, by Keras name."""
    averaged_over: dict[str, int]
    """Values of a channel that each batch norm averages over."""


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    threads = torch.get_num_threads()
    # PyTorch has no float64 kernel for depthwise convolutions: it runs thousands of tiny ones, where threads only wait.
    torch.set_num_threads(1)
    network = Xception(seeded.CLASSES, dropout=0.0).double().train()
    views = in_keras_terms(network)
    for name, view in views.items():
        view.copy_(torch.from_numpy(seeded.weight(name, tuple(view.shape))))

    averaged_over: dict[str, int] = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            layer = keras_layer(path)
            module.register_forward_hook(
                lambda _, inputs, __, layer=layer: averaged_over.update({layer: inputs[0][:, 0].numel()})
            )

    config = OptimConfig(lr=seeded.LEARNING_RATE, momentum=seeded.MOMENTUM, l2=seeded.L2, l2_sense="keras")
    optimizer, loss_of = create_optimizer(config, network), loss_function(config)
    shrunk = next(group["params"] for group in optimizer.param_groups if group["name"] == "l2")
    losses = []
    for step in range(seeded.STEPS):
        images, labels = (torch.from_numpy(array) for array in seeded.batch(step))
        loss = loss_of(network(images.permute(0, 3, 1, 2)), labels)
        losses.append(loss.item() + seeded.L2 * sum(p.square().sum().item() for p in shrunk))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return Run(losses, {name: view.numpy() for name, view in views.items()}, averaged_over)


def test_losses_are_keras(run: Run) -> None:
    assert run.losses == pytest.approx(REFERENCE["losses"], rel=0, abs=1e-9)


def test_every_weight_of_keras_is_one_of_ours(run: Run) -> None:
    assert sorted(run.weights) == sorted(REFERENCE["weights"])
    assert {name: list(value.shape) for name, value in run.weights.items()} == {
        name: stored["shape"] for name, stored in REFERENCE["weights"].items()
    }


def test_trained_weights_and_statistics_are_keras(run: Run) -> None:
    apart = {}
    for name, stored in REFERENCE["weights"].items():
        value = run.weights[name]
        if name.endswith("/moving_variance"):
            # PyTorch adds up unbiased variances of the batch, n / (n - 1) times Keras' biased ones.
            n = run.averaged_over[name.removesuffix("/moving_variance")]
            left_of_start = 0.99**seeded.STEPS * seeded.weight(name, value.shape)
            value = left_of_start + (value - left_of_start) * (n - 1) / n
        ours = seeded.summary(name, value)
        typical = stored["norm"] / value.size**0.5
        apart[name] = max(
            abs(ours["norm"] / stored["norm"] - 1.0),
            abs(ours["moved"] / stored["moved"] - 1.0),
            abs(ours["mean"] - stored["mean"]) / typical,
            *(abs(a - b) / typical for a, b in zip(ours["entries"], stored["entries"], strict=True)),
        )
    assert {name: distance for name, distance in apart.items() if not distance <= 1e-8} == {}


def test_the_reference_shows_training() -> None:
    """Each tensor moved ten thousand times further than the comparison lets pass: it compares something."""
    assert min(stored["moved"] / stored["norm"] for stored in REFERENCE["weights"].values()) > 1e-4
