"""timm's `legacy_xception` and the ports that share its names, against timm itself."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.weights.conftest import outputs, randomise, relative_error, smooth_images
from xception_pl import Xception, load_network
from xception_pl.nets.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return randomise(timm.create_model("legacy_xception", num_classes=7))


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
