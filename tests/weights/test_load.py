"""Files of our own: the weights come back bit for bit, with what was said about them."""

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.weights.conftest import SMALL, outputs, randomise, relative_error, smooth_images
from xception_pl import Xception, load_network
from xception_pl.module import XceptionModule
from xception_pl.nets.config import ModelConfig
from xception_pl.nets.preprocessing import Preprocessing
from xception_pl.weights.described import describe
from xception_pl.weights.safetensors import save_weights, write_safetensors

NAMES = ["ant", "bee", "cat", "dog", "emu"]


def module(ema_decay: float = 0.5, **model: Any) -> XceptionModule:
    """A module whose averaged weights differ from the last step's."""
    made = XceptionModule(
        ModelConfig(num_classes=5, **SMALL, **model),
        {"ema_decay": ema_decay},
        class_names=NAMES,
        preprocessing={"image_size": 75, "eval_crop": "resize"},
    )
    randomise(made.network)
    if made.average is not None:
        randomise(made.average.network)
        with torch.no_grad():
            for parameter in made.average.network.parameters():
                parameter.mul_(0.9)
    return made


def checkpoint(made: XceptionModule, path: Path) -> Path:
    torch.save({"state_dict": made.state_dict(), "hyper_parameters": dict(made.hparams), "epoch": 1}, path)
    return path


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_checkpoint_gives_the_averaged_weights_and_raw_the_last(tmp_path: Path) -> None:
    made = module()
    path = checkpoint(made, tmp_path / "any.name")
    network = load_network(path)
    assert_same_weights(network, made.evaluated)
    assert_same_weights(load_network(path, raw=True), made.network)
    assert not network.training
    assert network.class_names == NAMES
    assert network.preprocessing == Preprocessing(image_size=75, eval_crop="resize")


def test_a_checkpoint_without_averaging_gives_its_weights_either_way(tmp_path: Path) -> None:
    made = module(ema_decay=0.0)
    path = checkpoint(made, tmp_path / "a")
    assert_same_weights(load_network(path), made.network)
    assert_same_weights(load_network(path, raw=True), made.network)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"fc_units": (7,)},
        {"residual": False},
        {"segments": 4},
        {"numerics": "torch"},
        {"output_stride": 8},
        {"in_chans": 1},
    ],
    ids=str,
)
def test_safetensors_keep_the_network(tmp_path: Path, model: dict[str, Any]) -> None:
    made = module(**model)
    save_weights(made, tmp_path / "a")
    network = load_network(tmp_path / "a")
    assert_same_weights(network, made.evaluated)
    assert network.class_names == NAMES
    images = smooth_images(76, model.get("in_chans", 3))
    assert relative_error(outputs(network, images), outputs(made.evaluated, images)) < 1e-5  # the layout rounds


@pytest.mark.parametrize("loss", ["cross_entropy", "sigmoid"])
def test_the_loss_travels_with_the_weights(tmp_path: Path, loss: str) -> None:
    made = XceptionModule(ModelConfig(num_classes=5, **SMALL), {"ema_decay": 0, "loss": loss})
    save_weights(made, tmp_path / "a")
    for path in (tmp_path / "a", checkpoint(made, tmp_path / "b")):
        assert load_network(path).loss == loss
    with pytest.warns(UserWarning, match="new one of 7"):
        assert load_network(tmp_path / "a", num_classes=7).loss == "cross_entropy"


def test_a_network_of_ours_is_copied_with_all_that_is_known_of_it(small: Xception) -> None:
    network = randomise(Xception(5, numerics="torch", residual=False, **SMALL))
    assert isinstance(network, Xception)
    network.class_names, network.loss = NAMES, "sigmoid"
    network.preprocessing = Preprocessing(image_size=75, eval_crop="resize")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = load_network(network)
    assert torch.equal(outputs(copy, smooth_images(76)), outputs(network, smooth_images(76)))
    assert (copy.class_names, copy.loss, copy.preprocessing) == (NAMES, "sigmoid", network.preprocessing)
    assert copy.fc.weight.data_ptr() != network.fc.weight.data_ptr()


def test_another_network_of_table_1(tmp_path: Path) -> None:
    made = XceptionModule(ModelConfig(name="resnet10t", num_classes=5), {"ema_decay": 0.9})
    save_weights(made, tmp_path / "a")
    network = load_network(tmp_path / "a")
    assert_same_weights(network, made.evaluated)
    assert network.preprocessing == Preprocessing()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "anything.at.all."])
@pytest.mark.parametrize("nested", [(), ("state_dict",), ("model",), ("state_dict", "model")], ids=str)
def test_prefixes_and_nesting(tmp_path: Path, small: Xception, prefix: str, nested: tuple[str, ...]) -> None:
    content: Any = OrderedDict((prefix + name, tensor) for name, tensor in small.state_dict().items())
    for key in reversed(nested):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "a")
    with pytest.warns(UserWarning, match="our names but no description"):
        assert_same_weights(load_network(tmp_path / "a"), small)


def test_a_compiled_block_inside(tmp_path: Path, small: Xception) -> None:
    torch.save(
        {name.replace("block3.", "block3._orig_mod."): tensor for name, tensor in small.state_dict().items()},
        tmp_path / "a",
    )
    with pytest.warns(UserWarning, match="no description"):
        assert_same_weights(load_network(tmp_path / "a"), small)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0.3},
        {"width": 0.3, "channel_multiple": 1},
        {"fc_units": (9, 6)},
        {"residual": False},
        {"segments": 2},
        {"middle_blocks": 0},
    ],
    ids=str,
)
def test_shapes_tell_the_network(tmp_path: Path, options: dict[str, Any]) -> None:
    network = randomise(Xception(3, 1, **SMALL | options))
    torch.save(network.state_dict(), tmp_path / "a")
    with pytest.warns(UserWarning, match="no description"):
        assert_same_weights(load_network(tmp_path / "a"), network)


def test_the_old_format_of_torch(tmp_path: Path, small: Xception) -> None:
    torch.save(small.state_dict(), tmp_path / "a", _use_new_zipfile_serialization=False)
    assert (tmp_path / "a").read_bytes()[:1] == b"\x80"
    with pytest.warns(UserWarning, match="no description"):
        assert_same_weights(load_network(tmp_path / "a"), small)


def test_half_precision_becomes_float32(tmp_path: Path, small: Xception) -> None:
    save_file(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in small.state_dict().items()},
        tmp_path / "a",
    )
    with pytest.warns(UserWarning, match="no description"):
        network = load_network(tmp_path / "a")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert_same_weights(network, small.half().float())


def test_a_loaded_network_does_not_hang_on_its_file(tmp_path: Path) -> None:
    made = module()
    path = checkpoint(made, tmp_path / "a")
    network = load_network(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_weights(network, made.evaluated)


def test_another_number_of_classes_replaces_the_head_and_says_so(tmp_path: Path) -> None:
    made = module()
    path = checkpoint(made, tmp_path / "a")
    with pytest.warns(UserWarning, match="a has a logistic layer of 5 outputs: a new one of 7, not yet trained"):
        network = load_network(path, num_classes=7)
    assert network(smooth_images(75)).shape == (2, 7)
    assert network.class_names is None
    features, before = (outputs(n.forward_features, smooth_images(75)) for n in (network, made.evaluated))
    assert relative_error(features, before) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_network(path, num_classes=5).class_names == NAMES


def test_loading_executes_no_training_state(tmp_path: Path, small: Xception) -> None:
    described = describe(small)
    write_safetensors(tmp_path / "a", small.state_dict(), described)
    network = load_network(str(tmp_path / "a"))
    assert all(parameter.requires_grad for parameter in network.parameters())
    network.train()(smooth_images(75)).sum().backward()
    assert network.block1.bn1.num_batches_tracked == 1
