"""A network of ours as a Keras model, in Keras' own code."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from xception_pl.nets.xception import Xception
from xception_pl.weights.described import DESCRIPTION, describe_use
from xception_pl.weights.infer import check_layout
from xception_pl.weights.keras import keras_name, name_layers, to_keras
from xception_pl.weights.stored import WeightsError, needs


def keras_model(network: Xception) -> Any:
    """`keras.applications.Xception` with our weights, for images of any size; it gives logits.

    Raises:
        WeightsError: Keras is not installed, or its Xception cannot compute this network.
    """
    needs("keras")
    check_layout(network, "Keras' Xception", "keras", "export to onnx or torch-export")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    channels = network.block1.conv1.in_channels
    body = keras.applications.Xception(
        weights=None, include_top=False, pooling="avg", input_shape=(None, None, channels)
    )
    outputs = body.output
    if network.num_classes:
        outputs = keras.layers.Dense(network.num_classes, name="predictions")(outputs)
    model = keras.Model(body.input, outputs, name="xception")
    state = {keras_name(name): to_keras(name, tensor) for name, tensor in network.state_dict().items()}
    layers = {layer.name: layer for layer in model.layers if layer.weights}
    known = name_layers(
        {name: {v.name: torch.empty(tuple(v.shape)) for v in layer.weights} for name, layer in layers.items()}
    )
    for name, layer in layers.items():
        layer.set_weights([state[f"{known[name]}/{variable.name}"].contiguous().numpy() for variable in layer.weights])
    return model


def write_keras(network: Xception, path: Path) -> None:
    """Writes a whole model (`.keras`, or `.h5`, which Keras calls legacy), or weights alone (`.weights.h5`), as the ending says.

    Beside what Keras reads, the file has our description: class names, preprocessing, loss.
    """
    model = keras_model(network)
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    elif path.suffix in (".keras", ".h5"):
        model.save(path)
    else:
        raise WeightsError(f"{path.name} has no ending of Keras: use .keras, .weights.h5 or .h5.")
    description = json.dumps(describe_use(network)).encode()
    if path.suffix == ".keras":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(DESCRIPTION, description)
    else:
        with h5py.File(path, "a") as file:
            file[DESCRIPTION] = np.frombuffer(description, np.uint8)


def read_keras_model(path: Path, network: Xception) -> Callable[[Tensor], Tensor]:
    """The file in Keras."""
    import keras

    if path.name.endswith(".weights.h5"):
        model = keras_model(network)
        model.set_weights([0 * value for value in model.get_weights()])
        model.load_weights(path)
    else:
        model = keras.saving.load_model(path, compile=False)

    def outputs(images: Tensor) -> Tensor:
        result = model(images.permute(0, 2, 3, 1).contiguous().numpy(), training=False)
        return torch.from_numpy(keras.ops.convert_to_numpy(result))

    return outputs
