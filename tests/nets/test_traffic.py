"""The counted work of the network against hooks on the real one, and the passes that it is said to take."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xception_pl.nets.cost import macs
from xception_pl.nets.traffic import WAYS, Kernel, Way, kernels, layers, seconds
from xception_pl.nets.xception import Xception

OPTIONS: list[dict[str, Any]] = [
    {},
    {"width": 0.25, "middle_blocks": 1, "num_classes": 7, "fc_units": (16, 24)},
    {"width": 0.5, "middle_blocks": 2, "residual": False, "intermediate_activation": "elu"},
    {"width": 0.5, "middle_blocks": 1, "output_stride": 8, "segments": 4},
]


def on_meta(**options: Any) -> Xception:
    with torch.device("meta"):
        return Xception(**options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [299, 150, 71])
def test_every_module_is_counted_as_hooks_see_it(options: dict[str, Any], size: int) -> None:
    network = on_meta(**options).eval()
    seen: dict[str, tuple[int, int, int]] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            per_output = 0 if isinstance(module, nn.BatchNorm2d) else weight[0].numel()
            own = sum(parameter.numel() for parameter in module.parameters())
            seen[name] = (output.numel(), own, output.numel() * per_output)

        return see

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(hook(name))
    network(torch.empty(1, 3, size, size, device="meta"))
    counted = {
        layer.name: (layer.outputs, layer.weights, layer.macs) for layer in layers(network, size) if layer.weights
    }
    assert counted == seen
    assert sum(layer.macs for layer in layers(network, size)) == macs(network, (3, size, size))


class Calls(TorchDispatchMode):
    """Elements that each operation of interest writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: Counter[str] = Counter()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        kind = {"relu": "relu", "elu": "relu", "max_pool2d_with_indices": "pool", "add": "add", "mean": "mean"}.get(
            name
        )
        if kind is not None:
            result = output[0] if isinstance(output, tuple) else output
            self.written[kind] += result.numel()
            self.count[kind] += 1
        return output


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [299, 150])
def test_every_function_is_counted_as_torch_dispatches_it(options: dict[str, Any], size: int) -> None:
    network = on_meta(**options).eval()
    with torch.no_grad(), Calls() as calls:
        network(torch.empty(1, 3, size, size, device="meta"))
    counted, written = Counter[str](), Counter[str]()
    for layer in layers(network, size):
        kind = layer.kind.removeprefix("entry ")
        if kind in ("relu", "pool", "add", "mean"):
            counted[kind] += 1
            written[kind] += layer.outputs
    assert counted == calls.count
    assert written == calls.written


@pytest.mark.parametrize(
    ("way", "training", "passes"),
    [
        ("eager", True, 9 + 16),
        ("compiled", True, 7 + 13),
        ("fused", True, 4 + 9),
        ("ideal", True, 2 + 7),
        ("eager", False, 8),
        ("compiled", False, 6),
        ("fused", False, 4),
        ("ideal", False, 2),
    ],
)
def test_passes_of_a_separable_convolution(way: Way, training: bool, passes: int) -> None:
    network = on_meta()
    unit = ("block8.relu2", "block8.sepconv2", "block8.bn2")
    moved = sum(k.elements for k in kernels(network, 299, way, training=training) if k.name.startswith(unit))
    assert moved == passes * 728 * 19**2


def test_totals_at_the_papers_size() -> None:
    network = on_meta()

    def total(way: Way, training: bool) -> tuple[int, int]:
        found = kernels(network, 299, way, training=training)
        return sum(k.macs for k in found), round(sum(k.bytes(2, batch=10**12) for k in found) / 1e6)

    forward = macs(network, (3, 299, 299))
    assert forward == 8_357_403_496
    first = 149**2 * 32 * 27  # the gradient of the image is not wanted
    assert [total(way, True) for way in WAYS] == [(3 * forward - first, mb) for mb in (997, 845, 514, 388)]
    assert [total(way, False) for way in WAYS] == [(forward, mb) for mb in (316, 261, 159, 96)]


def test_weights_are_moved_once_a_batch_and_the_optimiser_passes_five_times() -> None:
    network = on_meta()
    optimiser = kernels(network, 71, "fused", training=True)[-1]
    assert (optimiser.name, optimiser.elements) == ("optimiser", 0)
    assert optimiser.bytes(4, batch=8) == 5 * 4 * 22_855_952 / 8


def test_a_kernel_takes_as_long_as_the_slower_of_bytes_and_arithmetic() -> None:
    bound_by_bytes = Kernel(name="copy", elements=100, weights=40, macs=1, index_bytes=8)
    bound_by_arithmetic = Kernel(name="product", elements=1, macs=1000)
    found = seconds([bound_by_bytes, bound_by_arithmetic], element_bytes=2, batch=4, bandwidth=10.0, rate=100.0)
    assert found == (200 + 8 + 80 / 4) / 10 + 2 * 1000 / 100
