"""The training path of the processor against autograd in float64."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception_pl.kernels import cpu, cpu_layers
from xception_pl.kernels.choose import use_kernels
from xception_pl.nets.convs import SeparableConv2d
from xception_pl.nets.xception import Block, Stem, Xception
from xception_pl.optim.averaging import PolyakAverage

CPU = torch.device("cpu")


@pytest.fixture(params=[8, 16], ids=["AVX2", "AVX-512"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both lengths of vectors: the compiler makes two of one where the processor has only the shorter."""
    monkeypatch.setattr(cpu_layers, "FLAGS", (*cpu_layers.FLAGS, f"-DWIDTH={request.param}"))
    cpu_layers.library.cache_clear()
    if cpu_layers.library()[0] is None:
        pytest.skip(cpu_layers.library()[1])
    yield
    cpu_layers.library.cache_clear()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def lively(module: nn.Module) -> nn.Module:
    """The module with batch norms that do something."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    return module


def gradients(module: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Output, gradients and statistics of one training step, `weight` being the gradient of the output."""
    module.zero_grad()
    out = module(x)
    out.backward(weight)
    found = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    found |= {name: b.clone() for name, b in module.named_buffers()}
    return found | {"output": out.detach()} | ({"gradient of the input": x.grad} if x.grad is not None else {})


def compare(module: nn.Module, x: Tensor, out_shape: tuple[int, ...]) -> None:
    """The fused module within float32's rounding of the plain one in float64."""
    weight = torch.randn(out_shape)
    plain, fused = copy.deepcopy(module).double().train(), copy.deepcopy(module).train()
    fused.__class__ = cpu.FusedStem if isinstance(module, Stem) else cpu.FusedBlock
    inputs = [
        x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad) for dtype in (torch.float64, torch.float32)
    ]
    want = gradients(plain, inputs[0], weight.double())
    got = gradients(fused, inputs[1], weight)
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value.dtype == torch.int64:
            assert torch.equal(got[name], value), name
            continue
        scale = value.norm() + 1e-6 * value.numel() ** 0.5
        assert (got[name] - value).norm() / scale < 3e-6, name


def block(
    channels: int, widths: tuple[int, ...], *, conv: type[SeparableConv2d] = SeparableConv2d, **options: Any
) -> nn.Module:
    return lively(Block(channels, widths, conv, **options))


@pytest.mark.parametrize("size", [(10, 10), (19, 19), (37, 9), (1, 4), (74, 5), (3, 171)])
@pytest.mark.parametrize(
    ("channels", "widths", "options"),
    [
        (32, (48, 32), {}),
        (13, (27, 13), {"shortcut": False}),
        (24, (8, 41), {"pool_stride": 2}),
        (8, (16, 16), {"pool_stride": 2, "relu_first": False}),
        (5, (9,), {"pool_stride": 1, "dilation": 2}),
        (8, (16,), {"pool_stride": 2, "shortcut": False}),
        (16, (16, 16, 16), {"dilation": 2}),
    ],
)
def test_a_block_s_gradients(
    vectors: None, size: tuple[int, int], channels: int, widths: tuple[int, ...], options: dict[str, Any]
) -> None:
    stride = options.get("pool_stride") or 1
    x = torch.randn(3, channels, *size, requires_grad=True)
    compare(block(channels, widths, **options), x, (3, widths[-1], -(-size[0] // stride), -(-size[1] // stride)))


@pytest.mark.parametrize(("channels", "width"), [(728, 728), (1024, 1536), (1536, 2048)])
def test_the_widest_layers(vectors: None, channels: int, width: int) -> None:
    x = torch.randn(3, channels, 5, 7, requires_grad=True)
    compare(block(channels, (width,), shortcut=False), x, (3, width, 5, 7))


@pytest.mark.parametrize("size", [(10, 19), (37, 12)])
@pytest.mark.parametrize(("channels", "widths"), [(3, (32, 64)), (1, (8, 16)), (5, (7, 9))])
def test_the_stem_s_gradients(vectors: None, size: tuple[int, int], channels: int, widths: tuple[int, int]) -> None:
    height, width = ((side - 3) // 2 - 1 for side in size)
    x = torch.randn(3, channels, *size)
    compare(lively(Stem(channels, widths)), x, (3, widths[1], height, width))


def network(**options: Any) -> Xception:
    return Xception(4, **{"width": 0.25, "dropout": 0.0, "middle_blocks": 1} | options)


def trained(model: nn.Module, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Losses of a few steps of SGD on images of 71 × 75."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.005)
    losses = []
    for step in range(steps):
        images = torch.randn(3 + step % 2, 3, 71, 75).to(dtype)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), torch.arange(len(images)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def fused(model: Xception) -> Xception:
    said = use_kernels(model, "fused", CPU)
    assert said == "fused: cpu.c, one pass over memory a layer"
    return model


def test_a_trajectory_is_the_plain_network_s(vectors: None) -> None:
    plain = network()
    ours = fused(copy.deepcopy(plain))
    want = trained(copy.deepcopy(plain).double(), 6, torch.float64)
    off = (trained(ours, 6) - want).abs()
    assert off[:3].max() < 1e-6
    assert off.max() < 2e-3  # one ReLU that rounds to the other side, and it grows; the plain network's differs as much
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert {type(b).__name__ for b in ours.children()} >= {"FusedStem", "FusedBlock"}


def test_a_step_is_the_same_to_the_bit_again_and_with_other_threads(vectors: None) -> None:
    model, threads = fused(network()), torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 5):
            torch.set_num_threads(count)
            copied = copy.deepcopy(model)
            stem = copied.block1(torch.linspace(-1, 1, 2 * 3 * 71 * 75).view(2, 3, 71, 75))
            copied.block3(copied.block2(stem)).square().sum().backward()
            results.append([p.grad for block in (copied.block1, copied.block3) for p in block.parameters()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_copies_and_pickles_stay_fused() -> None:
    model = fused(network())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.block5, cpu.FusedBlock)
        assert torch.equal(trained(copied, 2), trained(copy.deepcopy(model), 2))
    average = PolyakAverage(model, 0.9)
    average.update(model)
    assert average(torch.randn(1, 3, 71, 71)).shape == (1, 4)


def test_evaluation_and_other_precisions_are_the_plain_network_s() -> None:
    plain = network(output_stride=16)
    ours = fused(copy.deepcopy(plain))
    x = torch.randn(2, 3, 71, 71)
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.train()(x), plain.train()(x))
    assert torch.equal(ours.double()(x.double()), plain.double()(x.double()))


def test_frozen_statistics_are_the_plain_network_s() -> None:
    plain = network()
    ours = fused(copy.deepcopy(plain))
    for model in (plain, ours):
        model.train()
        model.block3.eval()
    x = torch.randn(2, 3, 71, 71)
    assert (ours(x) - plain(x)).abs().max() < 1e-5
    assert torch.equal(ours.block3.bn1.running_mean, torch.zeros_like(ours.block3.bn1.running_mean))


def test_frozen_weights_get_no_gradient() -> None:
    model = fused(network()).train()
    model.block1.requires_grad_(False)
    model.block4.sepconv1.requires_grad_(False)
    model(torch.randn(2, 3, 71, 71)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == [
        name for name, p in model.named_parameters() if not p.requires_grad
    ]


def test_other_blocks_stay_plain() -> None:
    model = network(intermediate_activation="relu")
    with pytest.raises(ValueError, match=r"fused is not possible here: the kernels for the processor know separable"):
        use_kernels(model, "fused", CPU)
    assert use_kernels(model, "auto", CPU).startswith("torch: the kernels for the processor know separable")


def test_one_value_a_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than one value a channel"):
        fused(network()).train()(torch.randn(1, 3, 7, 7))


def test_without_a_compiler_the_plan_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    cpu_layers.library.cache_clear()
    try:
        assert use_kernels(network(), "auto", CPU) == "torch: there is no C compiler (cc, gcc or clang)"
    finally:
        cpu_layers.library.cache_clear()


def test_a_short_vector_unit_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layers, "measured", lambda: False)
    assert use_kernels(network(), "auto", CPU) == "torch: the kernels for the processor were measured with AVX2 alone"


@pytest.mark.parametrize(
    ("width", "path"),
    [(0.25, "torch: the kernels for the processor are faster from half the paper's width on"), (0.5, "fused: cpu.c")],
)
def test_auto_leaves_narrow_networks_to_torch(monkeypatch: pytest.MonkeyPatch, width: float, path: str) -> None:
    monkeypatch.setattr(cpu_layers, "measured", lambda: True)
    assert use_kernels(network(width=width), "auto", CPU).startswith(path)
