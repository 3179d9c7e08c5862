"""Files for others: each is written beside its place, loaded back by whoever will read it, compared, and only then put there."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from xception_pl.nets.fold import fold_batch_norm
from xception_pl.nets.xception import Xception
from xception_pl.weights.described import DESCRIPTION, describe, describe_use
from xception_pl.weights.hub import write_hub_folder
from xception_pl.weights.infer import check_layout, model_of
from xception_pl.weights.keras_model import read_keras_model, write_keras
from xception_pl.weights.load import load_network
from xception_pl.weights.onnx import OPSET, read_onnx, write_onnx
from xception_pl.weights.proof import LARGEST_DIFFERENCE, Difference, difference
from xception_pl.weights.safetensors import write_safetensors, write_tensors
from xception_pl.weights.stored import Results, WeightsError
from xception_pl.weights.timm import timm_name

SUFFIXES = {
    "onnx": ".onnx",
    "safetensors": ".safetensors",
    "torch-export": ".pt2",
    "keras": ".keras",
    "timm": ".safetensors",
    "hub-folder": "",
}
"""Formats, and how their files end."""
_PROGRAMS = ("onnx", "torch-export")
"""Formats that hold a program and not only weights, which therefore may be another's than ours."""


@dataclass(frozen=True)
class Exported:
    """What was written and how it was proven."""

    path: Path
    reader: str
    """Who loaded it back."""
    against: Difference
    """The file against the network."""
    folded: Difference | None
    """The folded network against the network, where batch norm was folded."""


def export(network: Xception, to: str, output: Path, *, fold: bool = False, results: Results | None = None) -> Exported:
    """Writes a network in a format, and proves the file before it takes its place.

    Args:
        network: in evaluation mode.
        to: one of `SUFFIXES`.
        output: the file; for a hub-folder a folder that does not yet exist.
        fold: fold batch norm into the convolutions (onnx and torch-export).
        results: what was measured with these weights, for safetensors and the model card.

    Raises:
        WeightsError: the format cannot hold this network, a package is missing, or the file computes something else.
    """
    if not isinstance(network, Xception):
        raise WeightsError(f"only an Xception is exported, not a {type(network).__name__}: timm exports its own.")
    if fold and to not in _PROGRAMS:
        raise WeightsError(
            f"--to {to} holds weights that need their batch norm: --fold-bn is for {' and '.join(_PROGRAMS)}."
        )
    if output.is_dir():
        raise WeightsError(f"{output} is a folder that exists: name another one.")
    size, channels = network.preprocessing.image_size, model_of(network).in_chans
    written, folded = network, None
    if fold:
        written = fold_batch_norm(network)  # type: ignore[assignment]  # an Xception still, less its batch norms
        folded = difference(network, written, channels, size)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=".export-", dir=output.parent))
    except OSError as error:
        raise WeightsError(f"{output} cannot be written: {error.strerror}.") from error
    try:
        draft = workshop / output.name
        reader, outputs = _write(written, to, draft, results)
        against = difference(network, outputs, channels, size)
        if not against.largest <= LARGEST_DIFFERENCE:
            raise WeightsError(f"{output} was not written: loaded back by {reader}, its outputs differ; {against}.")
        os.replace(draft, output)
    except OSError as error:
        raise WeightsError(f"{output} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return Exported(output, reader, against, folded)


def _write(network: Xception, to: str, path: Path, results: Results | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Writes, reads back; returns who read, and what the file computes."""
    if to == "onnx":
        write_onnx(network, path)
        return f"ONNX Runtime (opset {OPSET})", read_onnx(path)
    if to == "torch-export":
        write_program(network, path)
        return "torch.export", torch.export.load(path).module()
    if to == "keras":
        write_keras(network, path)
        return "Keras", read_keras_model(path, network)
    if to == "timm":
        write_timm(network, path)
        return "timm", _as_timm("legacy_xception", checkpoint_path=path, num_classes=network.num_classes)
    if to == "safetensors":
        write_safetensors(path, network.state_dict(), describe(network) | {"results": results})
        return "load_network", load_network(path)
    assert to == "hub-folder", to
    write_hub_folder(network, path, results)
    ours, theirs = load_network(path), _as_timm(f"local-dir:{path}", pretrained=True)

    def both(images: Tensor) -> Tensor:
        first, second = ours(images), theirs(images)
        return first if torch.equal(first, second) else torch.full_like(first, torch.nan)

    return "load_network and timm", both


def write_program(network: Xception, path: Path) -> None:
    """Writes a `torch.export` program with batch, height and width left open; beside it, in `extra_files`, what to know."""
    size, channels = network.preprocessing.image_size, network.block1.conv1.in_channels
    assert isinstance(channels, int)
    open_sizes = {0: Dim("batch"), 2: Dim("height", min=71), 3: Dim("width", min=71)}
    program = torch.export.export(network, (torch.zeros(2, channels, size, size),), dynamic_shapes=(open_sizes,))
    torch.export.save(program, path, extra_files={DESCRIPTION: json.dumps(describe_use(network))})


def write_timm(network: Xception, path: Path) -> None:
    """Writes safetensors by the names of timm's `legacy_xception`.

    Raises:
        WeightsError: timm's network cannot compute this one.
    """
    check_layout(
        network, "timm's legacy_xception", "torch", "--to hub-folder is for timm too, through `import xception_pl`"
    )
    tensors = {timm_name(name): tensor for name, tensor in network.state_dict().items()}
    write_tensors(path, tensors, {name: json.dumps(value) for name, value in describe_use(network).items()})


def _as_timm(name: str, **options: Any) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, **options)
    return network.eval()
