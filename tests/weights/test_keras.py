"""Keras' files of every kind, written by Keras itself, against Keras itself."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.nets.test_keras_parity import from_keras, random_weights
from tests.weights.conftest import outputs, relative_error, smooth_images
from tests.weights.test_load import assert_same_weights
from xception_pl import Xception, load_network
from xception_pl.nets.preprocessing import Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras with NumPy 2

CLASSES = 1000


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


@pytest.fixture(scope="module")
def model(keras: Any) -> Any:
    keras.layers.Conv2D(1, 1)  # automatic names depend on what the session made before
    keras.layers.BatchNormalization()
    return random_weights(
        keras.applications.Xception(weights=None, classifier_activation=None, input_shape=(150, 150, 3))
    )


@pytest.fixture(scope="module")
def expected(model: Any) -> Xception:
    """By the path that tests/nets proves against Keras' outputs at four sizes."""
    return from_keras(model)


@pytest.fixture(scope="module")
def files(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("keras")
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    model.save_weights(folder / "model.weights.h5")
    yield folder
    for file in folder.iterdir():
        file.unlink()  # 90 MB each


def disguised(file: Path) -> Path:
    """The same file under a name that says nothing."""
    hidden = file.with_name("weights.bin")
    hidden.unlink(missing_ok=True)
    os.link(file, hidden)
    return hidden


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5"])
def test_every_format_gives_the_same_weights(files: Path, name: str, expected: Xception) -> None:
    network = load_network(disguised(files / name))
    assert_same_weights(network, expected)
    assert (network.numerics, network.preprocessing) == ("keras", Preprocessing(eval_crop="keras"))


def test_outputs_are_keras_own(files: Path, model: Any) -> None:
    images = smooth_images(150)
    with torch.no_grad():
        logits = model(images.permute(0, 2, 3, 1))
    assert relative_error(outputs(load_network(files / "model.weights.h5"), images), logits) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("size", [299, 256, 151, 72])
def test_outputs_are_keras_own_at_other_sizes(keras: Any, files: Path, model: Any, size: int) -> None:
    other = keras.applications.Xception(weights=None, classifier_activation=None, input_shape=(size, size, 3))
    other.load_weights(files / "model.weights.h5")
    images = smooth_images(size)
    with torch.no_grad():
        logits = other(images.permute(0, 2, 3, 1))
    assert relative_error(outputs(load_network(files / "model.keras"), images), logits) < 1e-4


def test_files_of_versions_that_note_no_names(files: Path, expected: Xception) -> None:
    path = files / "nameless.weights.h5"
    path.write_bytes((files / "model.weights.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        for group in file["layers"].values():
            group["vars"].attrs.clear()
        assert "name" not in file["layers/conv2d/vars"].attrs
    assert_same_weights(load_network(path), expected)
    path.unlink()


def test_names_of_the_first_release(keras: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras numbers layers as they are created; its code creates them today in the order in which it did for release v0.4."""
    from keras.src.applications import xception as source

    created: list[Any] = []

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            layer_class = getattr(keras.layers, name)

            def make(*args: Any, **options: Any) -> Any:
                layer = layer_class(*args, **options)
                created.append(layer)
                return layer

            return make if isinstance(layer_class, type) else layer_class

    monkeypatch.setattr(source, "layers", Recorded())
    model = random_weights(
        keras.applications.Xception(weights=None, classifier_activation=None, classes=4, input_shape=(71, 71, 3))
    )
    old_class = {name: name.lower().replace("conv2d", "convolution2d") for name in ("Conv2D", "SeparableConv2D")}
    old_class |= {name: name.lower() for name in ("BatchNormalization", "Dense")}
    old_leaf = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    counts = dict.fromkeys(old_class, 0) | {"Dense": 1}  # the release's file calls it dense_2
    names = {}
    for layer in created:
        kind = type(layer).__name__
        if kind in old_class:
            counts[kind] += 1
            names[layer.name] = f"{old_class[kind]}_{counts[kind]}"
    assert counts == {"Conv2D": 6, "SeparableConv2D": 34, "BatchNormalization": 40, "Dense": 2}
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [names.get(layer.name, layer.name).encode() for layer in model.layers]
        for layer in model.layers:
            name = names.get(layer.name, layer.name)
            group = file.create_group(name)
            leaves = [f"{name}_{old_leaf.get(variable.name, variable.name)}" for variable in layer.weights]
            group.attrs["weight_names"] = [leaf.encode() for leaf in leaves]
            for leaf, value in zip(leaves, layer.get_weights(), strict=True):
                group[leaf] = value
    network = load_network(tmp_path / "old.h5")
    images = smooth_images(71)
    with torch.no_grad():
        logits = model(images.permute(0, 2, 3, 1))
    assert relative_error(outputs(network, images), logits) < 1e-4


def release_names() -> dict[str, str]:
    """Keras' layers of today to those of release v0.4's files (`xception_weights_tf_dim_ordering_tf_kernels[_notop].h5`), written out.

    By the files' public readers in TensorFlow and Keras; shortcuts, which have no name today, as in our reader.
    """
    conv = ["block1_conv1", "block1_conv2", *(f"block{b}_shortcut" for b in (2, 3, 4, 13))]
    sepconv = [f"block{b}_sepconv{i}" for b in range(2, 15) for i in range(1, 4 if 5 <= b <= 12 else 3)]
    norm = ["block1_conv1", "block1_conv2"]
    norm += [f"block{b}_{layer}" for b in (2, 3, 4) for layer in ("shortcut", "sepconv1", "sepconv2")]
    norm += [f"block{b}_sepconv{i}" for b in range(5, 13) for i in (1, 2, 3)]
    norm += ["block13_shortcut", "block13_sepconv1", "block13_sepconv2", "block14_sepconv1", "block14_sepconv2"]
    assert (norm.index("block13_shortcut"), len(norm)) == (35, 40)  # batchnormalization_36 is the shortcut's
    names = {name: f"convolution2d_{n}" for n, name in enumerate(conv, 1)}
    names |= {name: f"separableconvolution2d_{n}" for n, name in enumerate(sepconv, 1)}
    names |= {f"{name}_bn": f"batchnormalization_{n}" for n, name in enumerate(norm, 1)}
    return names | {"predictions": "dense_2"}


@pytest.mark.parametrize("kind", ["whole", "notop", "another order", "another session"])
def test_files_of_the_first_release(model: Any, expected: Xception, tmp_path: Path, kind: str) -> None:
    """Layers are known by their numbers: in whatever order a file lists them, and from wherever a session counted."""
    shortcuts = {"Conv2D": iter((2, 3, 4, 13)), "BatchNormalization": iter((2, 3, 4, 13))}
    leaves = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    layers = []
    for layer in model.layers:
        class_name, name = type(layer).__name__, layer.name
        if layer.weights and not name.startswith(("block", "predictions")):
            name = f"block{next(shortcuts[class_name])}_shortcut{'_bn' * (class_name == 'BatchNormalization')}"
        if not layer.weights or (kind == "notop" and name == "predictions"):
            continue
        old, number = release_names()[name].split("_")
        old = f"{old}_{int(number) + (40 if kind == 'another session' else 0)}"
        values = zip(layer.weights, layer.get_weights(), strict=True)
        layers.append((old, {f"{old}_{leaves.get(v.name, v.name)}:0": value for v, value in values}))
    if kind == "another order":
        layers.sort()
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [name.encode() for name, _ in [("input_1", {}), *layers]]
        file.create_group("input_1").attrs["weight_names"] = np.empty(0, "S1")
        for name, values in layers:
            group = file.create_group(name)
            group.attrs["weight_names"] = [leaf.encode() for leaf in values]
            for leaf, value in values.items():
                group[leaf] = value
    network = load_network(tmp_path / "old.h5")
    (tmp_path / "old.h5").unlink()
    if kind == "notop":
        assert network.num_classes == 0
        network.reset_classifier(1000)
        network.fc.load_state_dict(expected.fc.state_dict())
    assert_same_weights(network, expected)


@pytest.mark.parametrize("name", ["tuned.keras", "tuned.h5", "tuned.weights.h5"])
def test_a_network_inside_another_with_a_head_of_its_own(keras: Any, tmp_path: Path, name: str) -> None:
    body = keras.applications.Xception(weights=None, include_top=False, pooling="avg", input_shape=(71, 71, 3))
    tuned = random_weights(
        keras.Sequential([keras.Input((71, 71, 3)), body, keras.layers.Dropout(0.2), keras.layers.Dense(3)])
    )
    save = tuned.save_weights if name.endswith("weights.h5") else tuned.save
    save(tmp_path / name)
    images = smooth_images(71)
    with torch.no_grad():
        logits = tuned(images.permute(0, 2, 3, 1))
    network = load_network(tmp_path / name)
    assert network.num_classes == 3
    assert relative_error(outputs(network, images), logits) < 1e-4


def test_without_a_head_the_network_has_none_unless_asked(keras: Any, tmp_path: Path) -> None:
    body = keras.applications.Xception(weights=None, include_top=False, input_shape=(71, 71, 3))
    body.save_weights(tmp_path / "a.weights.h5")
    network = load_network(tmp_path / "a.weights.h5")
    assert network.num_classes == 0
    assert outputs(network, smooth_images(71)).shape == (2, 2048)
    with pytest.warns(UserWarning, match="has no logistic layer: a new one of 9"):
        assert outputs(load_network(tmp_path / "a.weights.h5", num_classes=9), smooth_images(71)).shape == (2, 9)
