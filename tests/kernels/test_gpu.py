"""The whole network on the fused kernels: the plain network's training, what is kept for it, what falls back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.conftest import DEVICE, LARGE
from tests.kernels.reference import error
from xception_pl.kernels import choose, gpu, parts, tiles
from xception_pl.kernels.choose import use_kernels
from xception_pl.kernels.gpu import FusedXception
from xception_pl.nets.xception import Xception

CUDA = torch.device("cuda")


def network(**options: Any) -> Xception:
    """A narrow one, its batch norms away from their start."""
    made = Xception(5, **{"width": 0.03125, "middle_blocks": 1, "dropout": 0.0, **options}).to(DEVICE)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return made.train()


def fused(plain: Xception) -> Xception:
    """A copy that trains on the fused kernels."""
    made = copy.deepcopy(plain)
    use_kernels(made, "fused", CUDA)
    assert isinstance(made, FusedXception)
    return made


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed loss, by parameter; and the images' own, the logits, the buffers."""
    x = x.detach().requires_grad_()
    logits = model(x)
    wanted = torch.linspace(-1, 1, logits.numel(), device=x.device).reshape(logits.shape)
    (logits * wanted).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, "images": x.grad, "logits": logits.detach(), **dict(model.named_buffers())}


def assert_same(model: Xception, plain: Xception, size: int, batch: int, bound: float) -> None:
    x = torch.randn(batch, model.block1.conv1.in_channels, size, size, device=DEVICE)
    found = gradients(model, x)
    exact = gradients(copy.deepcopy(plain).double(), x.double())
    assert found.keys() == exact.keys()
    # A batch norm that follows takes away what a bias adds to a whole channel: what is left of its gradient is noise.
    scale = max(float(value.double().norm()) for value in exact.values())
    real = [name for name, value in exact.items() if value.double().norm() > 1e-9 * scale]
    assert {name: e for name in real if (e := error(found[name], exact[name])) > bound} == {}


def test_gradients_of_the_whole_network(set_tiles: Callable[..., None]) -> None:
    set_tiles(**LARGE)
    plain = network()
    assert_same(fused(plain), plain, 23, 3, 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"residual": False, "in_chans": 1, "middle_blocks": 0}], ids=str)
def test_gradients_at_71_pixels(options: dict[str, Any], set_tiles: Callable[..., None]) -> None:
    set_tiles(**LARGE)
    plain = network(**options)
    assert_same(fused(plain), plain, 71, 2, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_trajectory_is_that_of_the_plain_network(half: bool, set_tiles: Callable[..., None]) -> None:
    """Losses and state over steps of SGD: as near to float64's as the plain network's in the same precision.

    In float16 the state is compared after the first step: on maps as small as these, one ReLU whose input the two
    roundings put on different sides of 0 (seen at 0.006, both being off by 0.007) changes most gradients from then on.
    """
    set_tiles(**LARGE)
    plain = network(middle_blocks=0)
    batches = [(torch.randn(4, 3, 31, 31, device=DEVICE), torch.randint(0, 5, (4,), device=DEVICE)) for _ in range(2)]
    learned = [name for name, _ in plain.named_parameters()] + [n for n, _ in plain.named_buffers() if "running" in n]

    def state(model: nn.Module) -> Tensor:
        return torch.cat([model.state_dict()[name].flatten().double() for name in learned])

    def train(model: nn.Module, amp: bool) -> tuple[Tensor, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
        losses, states = [], []
        for x, label in batches:
            with torch.autocast(DEVICE, dtype=torch.float16, enabled=amp):
                logits = model(x.to(next(model.parameters()).dtype))
            loss = F.cross_entropy(logits.double(), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            states.append(state(model) - state(plain))
        return torch.stack(losses), states[0 if half else -1]

    exact_losses, exact = train(copy.deepcopy(plain).double(), False)
    plain_losses, plain_moved = train(copy.deepcopy(plain), half)
    losses, moved = train(fused(plain), half)
    floor = 1e-3 if half else 1e-5
    assert error(losses, exact_losses) < 3 * error(plain_losses, exact_losses) + floor
    assert error(moved, exact) < 3 * error(plain_moved, exact) + floor
    assert error(plain_moved, exact) < (0.1 if half else 1e-4)  # or the comparison would show nothing


def test_what_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 40 MB an image of 299 × 299 in 16 bits: counted on the real network, with kernels that only say shapes."""
    like = torch.empty_like

    def table(y: Tensor, rows: int = 5) -> Tensor:
        return y.new_empty(rows, y.shape[-1], dtype=torch.float32)

    def product(x: Tensor, weight: Tensor, *, stride: int = 1, **_: Any) -> tuple[Tensor, Tensor]:
        y = x[:, ::stride, ::stride].new_empty(*x[:, ::stride, ::stride].shape[:3], weight.shape[0])
        return y, table(y)

    monkeypatch.setattr(parts, "depthwise", lambda x, *_, **__: like(x))
    monkeypatch.setattr(parts, "pointwise", product)
    monkeypatch.setattr(parts, "pool", lambda y, *_: like(y[:, ::2, ::2].contiguous()))
    monkeypatch.setattr(parts.normalise, "statistics", table)
    monkeypatch.setattr(parts.normalise, "finish", lambda partial, norm: partial)
    monkeypatch.setattr(parts.normalise, "apply", lambda y, *_, **__: like(y))
    with torch.device("meta"):
        model = Xception().to(torch.bfloat16)
    gpu.fuse(model)

    def kept(batch: int) -> int:
        sizes: dict[int, int] = {}
        alive = []

        def keep(tensor: Tensor) -> Tensor:
            alive.append(tensor)  # so that no address is used again
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.empty(batch, 3, 299, 299, dtype=torch.bfloat16, device="meta"))
        return sum(sizes.values())

    assert kept(3) - kept(2) == 36_694_950


def test_the_state_dict_and_the_copies_stay(set_tiles: Callable[..., None]) -> None:
    plain = network()
    model = fused(plain)
    assert isinstance(model, Xception)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(copy.deepcopy(model), FusedXception)


def test_evaluation_and_frozen_blocks_are_plain(
    set_tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = network()
    model = fused(plain)
    x = torch.randn(2, 3, 39, 39, device=DEVICE)
    ran: list[bool] = []
    monkeypatch.setattr(
        gpu.FusedStage, "apply", lambda blocks, last, x, *w: ran.append(last) or x.new_zeros(2, 2, 2, 64)
    )
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    assert ran == []
    for freezes in (model, plain):
        freezes.train()
        for block in freezes._blocks()[:-1]:
            block.eval()
    model(x)
    assert ran == [True]
    model._blocks()[-1].eval()
    plain._blocks()[-1].eval()
    torch.testing.assert_close(model(x), plain(x))
    assert ran == [True]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"segments": 1}, "no segments other than one a channel"),
        ({"intermediate_activation": "relu"}, "no intermediate_activation"),
        ({"output_stride": 16}, "no dilation, which output_stride below 32 needs"),
        ({"output_stride": 8}, "no dilation, which output_stride below 32 needs"),
    ],
)
def test_what_has_no_kernels_is_refused(options: dict[str, Any], why: str) -> None:
    assert why in use_kernels(network(**options), "auto", CUDA)
    with pytest.raises(ValueError, match=why):
        use_kernels(network(**options), "fused", CUDA)


def test_a_pruned_network_is_refused() -> None:
    model = network()
    model.prune_intermediate_layers([0, 1])
    assert use_kernels(model, "auto", CUDA) == "torch: blocks were removed from the network"


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32, float16 and bfloat16, not in torch\.float64"):
        fused(network()).double()(torch.randn(1, 3, 39, 39, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize(
    ("speedup", "said"),
    [
        (None, "torch: the fused kernels have not been timed on this card"),
        (0.9, "torch: the fused kernels were measured at 0.90 × the plain layers' speed on this card"),
        (1.7, "fused: Triton kernels, 1.70 × the plain layers here"),
    ],
)
def test_auto_goes_by_what_was_measured(speedup: float | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "speedup", lambda: speedup)
    assert use_kernels(network(), "auto", CUDA).startswith(said)


def test_a_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert use_kernels(network(), "auto", CUDA) == "torch: triton is not installed"


def test_choosing_imports_no_triton() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['triton'] = None; import torch; from xception_pl.kernels import gpu, choose, tiles;"
        "from xception_pl.nets.xception import Xception; n = Xception(2, width=0.1, middle_blocks=0); gpu.fuse(n);"
        "print(n.eval()(torch.zeros(1, 3, 39, 39)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "torch.Size([1, 2])\n", done.stderr


def test_choose_knows_the_path() -> None:
    assert choose.PATHS["cuda"] == gpu.__name__
