"""Our safetensors: the evaluated weights, with what is needed to use them in the file's metadata."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file

from xception_pl.module import XceptionModule


def save_weights(module: XceptionModule, path: Path) -> None:
    """Writes the weights that are evaluated (averaged, where averaging is on) with model, classes and preprocessing."""
    hparams = module.hparams
    described = {name: hparams[name] for name in ("model", "class_names", "preprocessing")}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.evaluated.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(
        tensors, partial, metadata={"format": "pt", **{name: json.dumps(value) for name, value in described.items()}}
    )
    os.replace(partial, path)
