"""Inference on the processor against the same network in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from xception_pl.kernels import cpu_layers
from xception_pl.kernels.inference import fast_inference
from xception_pl.nets.xception import Xception


def alive(network: nn.Module) -> nn.Module:
    """The network with batch norms that do something."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.1)
    return network.eval()


@torch.no_grad()
def exact(network: nn.Module, images: Tensor) -> Tensor:
    logits = network.double()(images.double())
    network.float()
    return logits


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture(params=[8, 16], ids=["AVX2", "AVX-512"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both lengths of vectors: the compiler makes two of one where the processor has only the shorter."""
    monkeypatch.setattr(cpu_layers, "FLAGS", (*cpu_layers.FLAGS, f"-DWIDTH={request.param}"))
    cpu_layers.library.cache_clear()
    if cpu_layers.library()[0] is None:
        pytest.skip(cpu_layers.library()[1])
    yield
    cpu_layers.library.cache_clear()


@pytest.mark.parametrize(
    ("size", "batch", "options"),
    [
        ((71, 71), 1, {}),
        ((75, 84), 3, {"width": 0.25}),
        ((84, 75), 2, {"width": 0.25, "residual": False}),
        ((71, 72), 1, {"width": 0.3, "channel_multiple": 1, "in_chans": 1, "fc_units": (9,)}),
        ((90, 71), 1, {"width": 0.25, "output_stride": 8}),
        ((71, 91), 2, {"width": 0.25, "output_stride": 16, "in_chans": 5}),
        ((7, 19), 5, {"width": 0.1}),
        ((71, 71), 1, {"width": 0.25, "intermediate_activation": "elu"}),
        ((71, 71), 1, {"width": 0.25, "segments": 4}),
    ],
)
def test_logits_are_those_of_the_network(
    vectors: None, size: tuple[int, int], batch: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    network = alive(Xception(10, **options))
    images = torch.randn(batch, options.get("in_chans", 3), *size)
    fast = fast_inference(network)
    assert fast.path.startswith("fused: cpu.c")
    assert error(fast(images), exact(network, images)) < 2e-6


def test_threads_change_no_bit(vectors: None) -> None:
    torch.manual_seed(0)
    fast, images = fast_inference(alive(Xception(10, width=0.5))), torch.randn(1, 3, 71, 71)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(fast(images))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_number_stays_none(vectors: None) -> None:
    images = torch.randn(2, 3, 71, 71)
    images[1, 0, 30, 30] = torch.nan
    logits = fast_inference(alive(Xception(10, width=0.25)))(images)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_other_networks_take_torchs_path() -> None:
    network = timm.create_model("test_vit", num_classes=3)
    fast = fast_inference(network)
    images = torch.randn(1, 3, *network.patch_embed.img_size)
    assert fast.path == "torch: only xception has kernels for the processor, not VisionTransformer"
    assert error(fast(images), network(images)) < 1e-5


def test_other_precisions_take_torchs_path() -> None:
    network = alive(Xception(3, width=0.25)).double()
    fast, images = fast_inference(network), torch.randn(1, 3, 71, 71)
    assert fast.path == "torch: the kernels are for float32 on the processor, not float64 on cpu"
    assert error(fast(images), network(images.double())) < 1e-12


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    cpu_layers.library.cache_clear()
    try:
        network, images = alive(Xception(3, width=0.25)), torch.randn(1, 3, 71, 71)
        fast = fast_inference(network)
        assert fast.path == "torch: there is no C compiler (cc, gcc or clang)"
        assert error(fast(images), network(images)) < 1e-6
    finally:
        cpu_layers.library.cache_clear()
