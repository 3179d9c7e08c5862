"""Our safetensors: the evaluated weights, with what is needed to use them in the file's metadata."""

import json
from pathlib import Path

from safetensors.torch import save

from xception_pl.durable import durable_write
from xception_pl.module import XceptionModule


def save_weights(module: XceptionModule, path: Path) -> None:
    """Writes the weights that are evaluated (averaged, where averaging is on) with model, classes and preprocessing."""
    hparams = module.hparams
    described = {name: hparams[name] for name in ("model", "class_names", "preprocessing")}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.evaluated.state_dict().items()}
    metadata = {"format": "pt", **{name: json.dumps(value) for name, value in described.items()}}
    with durable_write(path) as file:
        file.write(save(tensors, metadata))
