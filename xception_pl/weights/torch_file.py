"""Files of torch.save, new (zip) and old (bare pickle): checkpoints of Lightning, timm, Cadene and anyone's state dicts."""

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xception_pl.weights.described import read_description
from xception_pl.weights.stored import Stored, WeightsError

_INNER = ("state_dict", "model", "model_state_dict", "network", "net")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")


def read_torch(path: Path, source: str) -> Stored:
    """Reads a file of torch.save without running anything in it.

    Raises:
        WeightsError: the file needs code to be read, is damaged, or holds no weights.
    """
    if zipfile.is_zipfile(path):
        _check_archive(path, source)
    content = _load(path, source)
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{source} holds a {type(content).__name__}, no weights: save model.state_dict() instead of anything else."
        )
    hparams = content.get("hyper_parameters")
    if isinstance(hparams, Mapping) and "state_dict" in content and "model" in hparams:
        return _of_our_run(content, hparams, source)
    stored = Stored(source, "a file of torch.save", _tensors(_inner(content, _INNER), source))
    averaged = next((content[name] for name in _AVERAGED if isinstance(content.get(name), Mapping)), None)
    if averaged is not None:
        stored.raw_tensors, stored.tensors = stored.tensors, _tensors(averaged, source)
    return stored


def _of_our_run(content: Mapping[str, Any], hparams: Mapping[str, Any], source: str) -> Stored:
    """A checkpoint of XceptionModule: the network, and the averaged one where the run averages."""
    tensors = _tensors(content["state_dict"], source)
    network = {name.removeprefix("network."): tensor for name, tensor in tensors.items() if name.startswith("network.")}
    prefix = "average.network."
    averaged = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    stored = Stored(source, "a checkpoint of a run", averaged or network, raw_tensors=network)
    optim = hparams.get("optim")
    loss = optim.get("loss") if isinstance(optim, Mapping) else None
    read_description(stored, {**hparams, "loss": loss, "results": content.get("results")})
    return stored


def _inner(content: Mapping[str, Any], names: tuple[str, ...], depth: int = 3) -> Mapping[str, Any]:
    """The state dict inside `{"state_dict": {"model": …}}`."""
    inside = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
    return content if inside is None or depth == 0 else _inner(inside, names, depth - 1)


def _tensors(content: Any, source: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise WeightsError(f"{source} is damaged: its state dict is a {type(content).__name__}.")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        # A view may claim more than is stored: a single number, repeated by strides of 0 to any size.
        dense = tensor.layout == torch.strided and not tensor.is_quantized
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(f"{source} is refused: its tensor {name} is no plain array of the numbers in the file.")
    return tensors


def _check_archive(path: Path, source: str) -> None:
    """torch.save stores its members as they are: an archive that would unpack to more is none of its."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise WeightsError(f"{source} is damaged: {error}.") from error
    names = [member.filename for member in members]
    if any(name.endswith("constants.pkl") for name in names):
        raise WeightsError(
            f"{source} is a TorchScript program, which would run as code: save the state_dict() of the network in it instead."
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise WeightsError(f"{source} is refused: it is compressed, which torch.save never does.")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise WeightsError(f"{source} is refused: its members claim more bytes than the file has.")


def _load(path: Path, source: str) -> Any:
    zipped = zipfile.is_zipfile(path)
    try:
        # timm's training script keeps its arguments beside the weights: a Namespace is a bag of values, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the unpickler raises whatever broken bytes lead it to
        text = str(error)
        found = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", text)
        if found and "weights_only" in text.lower().replace(" ", "_"):
            raise WeightsError(
                f"{source} is refused: it needs {found[1]}, and to make that means to run code of the file. Whoever trusts "
                "it can load it with the program that wrote it and save the state_dict() alone."
            ) from error
        # PyTorch's own text goes on to recommend what must not be done here
        found = re.search(r"WeightsUnpickler error: (.*)", text)
        reason = (
            found[1] if found else text.splitlines()[0] if text and "weights_only" not in text else type(error).__name__
        )
        raise WeightsError(f"{source} cannot be read as a file of torch.save: {reason.rstrip('.')[:200]}.") from error
