"""timm's `legacy_xception` and the ports that share its names, against timm itself."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.weights.conftest import outputs, randomise, relative_error, smooth_images
from xception_pl import Xception, load_network
from xception_pl.nets.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return randomise(timm.create_model("legacy_xception", num_classes=7))


def test_an_installed_network_brings_its_preprocessing_and_class_names() -> None:
    network = timm.create_model(
        "legacy_xception", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 224, 224), "label_names": ("ant", "bee")}
    )  # fmt: skip
    loaded = load_network(network)
    assert loaded.class_names == ["ant", "bee"]
    assert loaded.preprocessing == Preprocessing(image_size=224, eval_crop="timm")


def of_cadene(theirs: nn.Module) -> dict[str, Any]:
    """As the file `xception-b5690688.pth`: pointwise kernels as matrices; its head as Cadene's class calls it."""
    state = {name.replace("fc.", "last_linear."): tensor for name, tensor in theirs.state_dict().items()}
    return {
        name: tensor[:, :, 0, 0] if "pointwise" in name else tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize(
    "size", [150, 97, pytest.param(299, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)]
)
def test_outputs_are_timms_own(theirs: nn.Module, size: int) -> None:
    network = load_network(theirs)
    images = smooth_images(size)
    logits = outputs(theirs, images)
    assert relative_error(outputs(network, images), logits) < 1e-4
    assert (logits[0] - logits[1]).abs().mean() > 0.02 * logits.abs().mean()  # the comparison says something


def test_keras_numerics_would_not_pass(theirs: nn.Module) -> None:
    network = load_network(theirs)
    images = smooth_images(150)
    keras = Xception(7, numerics="keras").eval()
    keras.load_state_dict(network.state_dict())
    assert relative_error(outputs(keras, images), outputs(theirs, images)) > 1e-3


def test_numerics_are_pytorchs_defaults(theirs: nn.Module) -> None:
    network = load_network(theirs)
    ours = {(module.eps, module.momentum) for module in network.modules() if isinstance(module, nn.BatchNorm2d)}
    assert ours == {(m.eps, m.momentum) for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-5, 0.1)}
    assert network.preprocessing == Preprocessing(eval_crop="timm")


@pytest.mark.parametrize(
    ("kind", "prefix", "nested"),
    [
        ("timm", "module.", "state_dict"),
        ("cadene", "", None),
        ("cadene", "_orig_mod.", "model"),
        ("faceforensics", "model.", None),
    ],
)
def test_files_give_every_weight(theirs: nn.Module, tmp_path: Path, kind: str, prefix: str, nested: str | None) -> None:
    state = {"timm": theirs.state_dict(), "cadene": of_cadene(theirs)}.get(kind)
    if state is None:
        state = {name.replace("last_linear", "last_linear.1"): tensor for name, tensor in of_cadene(theirs).items()}
    content: Any = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({nested: content} if nested else content, tmp_path / "a")
    network, expected = load_network(tmp_path / "a"), load_network(theirs)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def of_tstandley(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The forward pass of the port that timm's and Cadene's descend from, written out from its file: logits (B, K).

    In its blocks the shortcut reads what the block was given, and ReLU stands before each separable convolution but the
    first block's first.
    """

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def separable(name: str, x: Tensor) -> Tensor:
        x = F.conv2d(x, state[f"{name}.conv1.weight"], padding=1, groups=x.shape[1])
        return F.conv2d(x, state[f"{name}.pointwise.weight"])

    x = norm("bn1", F.conv2d(x, state["conv1.weight"], stride=2)).relu()
    x = norm("bn2", F.conv2d(x, state["conv2.weight"])).relu()
    for number in range(1, 13):
        block, stride = f"block{number}", 2 if number in (1, 2, 3, 12) else 1
        y, place = x, 0
        for layer in range(2 if stride == 2 else 3):
            if number > 1 or layer:
                y, place = y.relu(), place + 1
            y = norm(f"{block}.rep.{place + 1}", separable(f"{block}.rep.{place}", y))
            place += 2
        if stride == 2:
            y = F.max_pool2d(y, 3, 2, padding=1)
            x = norm(f"{block}.skipbn", F.conv2d(x, state[f"{block}.skip.weight"], stride=2))
        x = x + y
    x = norm("bn3", separable("conv3", x)).relu()
    x = norm("bn4", separable("conv4", x)).relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("size", [97, 150])
def test_outputs_are_tstandleys(theirs: nn.Module, tmp_path: Path, size: int) -> None:
    """His file: a bare state dict of an old torch, by the names that timm kept, without counters."""
    state = {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "xception-c0a72b38.pth.tar", _use_new_zipfile_serialization=False)
    images = smooth_images(size)
    network = load_network(tmp_path / "xception-c0a72b38.pth.tar")
    assert relative_error(outputs(network, images), of_tstandley(state, images)) < 1e-4


def test_safetensors_of_the_hub(theirs: nn.Module, tmp_path: Path) -> None:
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    images = smooth_images(97)
    network = load_network(tmp_path / "model.safetensors")
    assert torch.equal(outputs(network, images), outputs(load_network(theirs), images))


def test_a_training_checkpoint_of_timm_gives_the_averaged_weights(theirs: nn.Module, tmp_path: Path) -> None:
    import argparse

    state = theirs.state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": other, "state_dict_ema": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a")
    assert torch.equal(load_network(tmp_path / "a").fc.weight, state["fc.weight"])
    assert torch.equal(load_network(tmp_path / "a", raw=True).fc.weight, other["fc.weight"])
