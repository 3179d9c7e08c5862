"""Keras' Xception: `.keras`, `.weights.h5` and `.h5`, with the names of today's code or of the first release.

Blocks and layers have names there, except the four shortcuts and their batch norms, whose automatic names depend on
the session; and `.weights.h5` addresses layers by class and order. So layers become known by their name where it is
one of the paper's blocks, and by shape and order otherwise.
"""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import torch
from torch import Tensor

from xception_pl.nets.preprocessing import Preprocessing
from xception_pl.weights.described import DESCRIPTION, read_json
from xception_pl.weights.hdf5 import array, groups, member, open_hdf5, texts
from xception_pl.weights.layout import Layout
from xception_pl.weights.stored import Stored, WeightsError

WEIGHTS_MEMBER = "model.weights.h5"
_SHORTCUTS = {128: 2, 256: 3, 728: 4, 1024: 13}
"""Channels of a shortcut's output, and its block."""
_SEPARABLE = [f"block{b}_sepconv{i}" for b in range(2, 15) for i in range(1, 4 if 5 <= b <= 12 else 3)]
_LEAVES = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}
"""Variables as Keras 1 called them; its `running_std` holds the variance."""
_ORDERS = {
    frozenset({"kernel"}): ("kernel",),
    frozenset({"kernel", "bias"}): ("kernel", "bias"),
    frozenset({"depthwise_kernel", "pointwise_kernel"}): ("depthwise_kernel", "pointwise_kernel"),
    frozenset({"gamma", "beta", "moving_mean", "moving_variance"}): ("gamma", "beta", "moving_mean", "moving_variance"),
}
"""Variables of each kind of layer, in the order in which `.weights.h5` numbers them."""

_Layer = dict[str, Tensor]


def keras_name(name: str) -> str:
    """Our name to Keras', as `layer/variable`; shortcuts, which have no name there, are `blockN_shortcut[_bn]`."""
    *path, leaf = name.split(".")
    variables = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    if path == ["fc"]:
        return f"predictions/{'kernel' if leaf == 'weight' else leaf}"
    block, layer, *kind = path
    if layer == "shortcut_bn":
        return f"{block}_{layer}/{variables.get(leaf, leaf)}"
    if layer.startswith("bn"):
        conv = "conv" if block == "block1" else "sepconv"
        return f"{block}_{conv}{layer[2:]}_bn/{variables.get(leaf, leaf)}"
    return f"{block}_{layer}/{'_'.join([*kind, 'kernel'])}"


def to_keras(name: str, tensor: Tensor) -> Tensor:
    """Our tensor in Keras' axes: kernels (3, 3, in, out), depthwise (3, 3, channels, 1), dense (in, out)."""
    if tensor.dim() == 2:
        return tensor.T
    if tensor.dim() == 4:
        return tensor.permute(2, 3, 0, 1) if "depthwise" in name else tensor.permute(2, 3, 1, 0)
    return tensor


def from_keras(name: str, tensor: Tensor) -> Tensor:
    """Keras' tensor in our axes."""
    if tensor.dim() == 2:
        return tensor.T
    if tensor.dim() == 4:
        return tensor.permute(2, 3, 0, 1) if "depthwise" in name else tensor.permute(3, 2, 0, 1)
    return tensor


KERAS = Layout("Keras' names", keras_name, to_keras, from_keras, "keras", Preprocessing(eval_crop="keras"))


def read_keras_archive(path: Path, source: str) -> Stored:
    """Reads the weights in a `.keras` file; its configuration, which could name code, is not looked at.

    Raises:
        WeightsError: the file is damaged or holds no Xception.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = _unpacked(archive, WEIGHTS_MEMBER, source)
            described = _unpacked(archive, DESCRIPTION, source) if DESCRIPTION in archive.namelist() else None
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        OSError,
        RuntimeError,
        KeyError,
        EOFError,
        ValueError,
        NotImplementedError,
    ) as error:
        raise WeightsError(f"{source} is damaged: {str(error).rstrip('.')}.") from error
    except Exception as error:  # zlib.error and its like have no common base
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{source} is damaged: {str(error).rstrip('.')}.") from error
    stored = read_keras_hdf5(io.BytesIO(content), source)
    if described is not None:
        read_json(stored, described)
    return stored


def _unpacked(archive: zipfile.ZipFile, name: str, source: str) -> bytes:
    member = archive.getinfo(name)
    if member.file_size > 16 * member.compress_size:
        raise WeightsError(f"{source} is refused: {name} in it would unpack to {member.file_size} bytes.")
    with archive.open(member) as file:
        return file.read(member.file_size)


def read_keras_hdf5(file: Path | IO[bytes], source: str) -> Stored:
    """Reads `.weights.h5`, or the older `.h5` of weights or of a whole model.

    Raises:
        WeightsError: the file is damaged, holds no Xception, or reaches out of itself.
    """
    with open_hdf5(file, source) as opened:
        top = member(opened, "model_weights", source) if "model_weights" in opened else opened
        old = "layer_names" in top.attrs or "layer_names0" in top.attrs
        layers = dict(_layers_of_old_files(top, source) if old else _layers_by_class(opened, source))
        described = array(opened, DESCRIPTION, source, kind="u").tobytes() if DESCRIPTION in opened else None
    dense = [name for name, values in layers.items() if "kernel" in values and values["kernel"].dim() == 2]
    if len(dense) > 1:
        raise WeightsError(
            f"{source} has {len(dense)} dense layers, {', '.join(dense[:4])}: only one, after the pooling, can be read as Xception's."
        )
    known = name_layers(layers)
    tensors = {f"{known[layer]}/{leaf}": tensor for layer, values in layers.items() for leaf, tensor in values.items()}
    stored = Stored(source, "a Keras file", tensors)
    if described is not None:
        read_json(stored, described)
    return stored


def _layers_of_old_files(top: h5py.Group, source: str) -> Iterator[tuple[str, _Layer]]:
    """Layers by name from groups that list their weights: `block1_conv1/kernel:0`, or `convolution2d_1_W` in the first release."""
    layers: dict[str, _Layer] = {}
    for group_name in texts(top, "layer_names"):
        group = member(top, group_name, source)
        for weight_name in texts(group, "weight_names"):
            *path, last = weight_name.split("/")
            leaf = last.partition(":")[0]
            layer = path[-1] if path else group_name
            leaf = leaf.removeprefix(f"{layer}_")
            layers.setdefault(layer, {})[_LEAVES.get(leaf, leaf)] = _tensor(array(group, weight_name, source))
    yield from layers.items()


def _layers_by_class(top: h5py.File, source: str) -> Iterator[tuple[str, _Layer]]:
    """Layers from `layers/separable_conv2d_3/vars/0`: by the name that newer versions note, else by class and number."""
    for path, group in groups(top, source):
        if not path.endswith("/vars") or path.startswith(("optimizer", "_optimizer")) or not len(group):
            continue
        arrays = [_tensor(array(group, str(i), source)) for i in range(len(group))]
        noted = group.attrs.get("name")
        name = noted if isinstance(noted, str) else path.removesuffix("/vars").rpartition("/")[2]
        yield name, dict(zip(_variables(arrays), arrays, strict=True))


def _variables(arrays: list[Tensor]) -> tuple[str, ...]:
    """What a layer's numbered variables are, told by their shapes."""
    dims = [a.dim() for a in arrays]
    for order in _ORDERS.values():
        wanted = {"kernel": (2, 4), "depthwise_kernel": (4,), "pointwise_kernel": (4,)}
        if len(order) == len(dims) and all(d in wanted.get(leaf, (1,)) for leaf, d in zip(order, dims, strict=True)):
            return order
    return tuple(str(i) for i in range(len(arrays)))


def name_layers(layers: dict[str, _Layer]) -> dict[str, str]:
    """Names of a file's layers to the paper's: `block2_sepconv1`, `block2_shortcut_bn`, `predictions`.

    Those of which nothing is known, a second dense layer among them, keep their own.
    """
    kinds: dict[str, list[str]] = {"conv": [], "separable": [], "norm": [], "dense": []}
    for name, values in layers.items():
        if re.match(r"block\d+_", name):
            continue
        if "pointwise_kernel" in values:
            kinds["separable"].append(name)
        elif "gamma" in values:
            kinds["norm"].append(name)
        elif "kernel" in values:
            kinds["dense" if values["kernel"].dim() == 2 else "conv"].append(name)
    for names in kinds.values():
        names.sort(key=_number)
    targets = {name: name for name in layers}
    if len(kinds["dense"]) == 1:
        targets[kinds["dense"][0]] = "predictions"
    targets |= _convolution_names(kinds["conv"], layers)
    targets |= dict(zip(kinds["separable"], _SEPARABLE, strict=False))
    targets |= _norm_names(kinds["norm"], layers)
    return targets


def _number(name: str) -> int:
    """Keras counts layers of a class: the first has no number, or in the first release a 1."""
    found = re.search(r"_(\d{1,9})$", name)
    return int(found[1]) if found else 0


def _convolution_names(names: list[str], layers: dict[str, _Layer]) -> dict[str, str]:
    """Regular convolutions, each of another shape: the stem's two and the shortcuts."""
    targets = {}
    for name in names:
        height, _, _, channels = layers[name]["kernel"].shape
        if height == 3 and channels in (32, 64):
            targets[name] = f"block1_conv{1 if channels == 32 else 2}"
        elif height == 1 and channels in _SHORTCUTS:
            targets[name] = f"block{_SHORTCUTS[channels]}_shortcut"
    return targets


def _norm_names(names: list[str], layers: dict[str, _Layer]) -> dict[str, str]:
    """Batch norms without a name: the four shortcuts', told by their channels; or all 40, told by their order.

    In the order of creation (the first release) a shortcut's precedes its block's two, in that of the graph
    (`.weights.h5`) it follows them. Block 13, the only one with two widths, shows which it is.
    """
    channels = [layers[name]["gamma"].numel() for name in names]
    if len(names) != 40:
        return {
            name: f"block{_SHORTCUTS[n]}_shortcut_bn"
            for name, n in zip(names, channels, strict=True)
            if n in _SHORTCUTS
        }
    first = channels[35] == 1024
    order = ["block1_conv1_bn", "block1_conv2_bn"]
    for block in range(2, 15):
        own = [f"{layer}_bn" for layer in _SEPARABLE if layer.startswith(f"block{block}_")]
        shortcut = [f"block{block}_shortcut_bn"] if block in _SHORTCUTS.values() else []
        order += shortcut + own if first else own + shortcut
    return dict(zip(names, order, strict=True))


def _tensor(values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
