"""safetensors: ours, with what is needed to use the weights in the file's metadata, and anyone's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from xception_pl.durable import durable_write
from xception_pl.weights.described import NAMES, read_description
from xception_pl.weights.stored import Results, Stored, WeightsError

if TYPE_CHECKING:
    from xception_pl.module import XceptionModule  # it takes seconds to import, and loading needs none of it


def save_weights(module: "XceptionModule", path: Path, results: Results | None = None) -> None:
    """Writes the weights that are evaluated (averaged, where averaging is on) with model, classes, preprocessing, loss and results."""
    hparams = module.hparams
    described = {name: hparams[name] for name in ("model", "class_names", "preprocessing")}
    described |= {"loss": hparams["optim"]["loss"], "results": results}
    write_safetensors(path, module.evaluated.state_dict(), described)


def write_safetensors(path: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Writes tensors by our names with their description (:mod:`xception_pl.weights.described`)."""
    write_tensors(path, tensors, {name: json.dumps(value) for name, value in described.items()})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors by any names."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with durable_write(path) as file:
        file.write(save(plain, {"format": "pt", **metadata}))


def read_safetensors(path: Path, source: str) -> Stored:
    """Reads a safetensors file, and the description in its metadata where it is one of ours.

    Raises:
        WeightsError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")[:200]
        raise WeightsError(f"{source} is no whole safetensors file: {reason}.") from error
    stored = Stored(source, "a safetensors file", tensors)
    if "preprocessing" in metadata:
        described = {}
        for name in NAMES:
            try:
                described[name] = json.loads(metadata.get(name, "null"))
            except (ValueError, RecursionError) as error:
                raise WeightsError(f"{source} is damaged: its metadata {name} is no JSON.") from error
        read_description(stored, described)
    return stored
