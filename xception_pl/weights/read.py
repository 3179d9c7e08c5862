"""Which reader a file needs, by what it contains."""

import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from xception_pl.nets.xception import Xception
from xception_pl.weights.foreign import read_config
from xception_pl.weights.hub import WEIGHT_FILES, as_hub_id, fetch, fetch_weights
from xception_pl.weights.infer import model_of
from xception_pl.weights.keras import WEIGHTS_MEMBER, read_keras_archive, read_keras_hdf5
from xception_pl.weights.safetensors import read_safetensors
from xception_pl.weights.stored import Stored, WeightsError
from xception_pl.weights.torch_file import read_torch

_HDF5 = b"\x89HDF\r\n\x1a\n"
_LONGEST_HEADER = 100_000_000  # bytes, of safetensors


def read_weights(source: str | Path | nn.Module) -> Stored:
    """Opens weights wherever they are.

    Raises:
        WeightsError: there is nothing there, or nothing that can be read.
    """
    if isinstance(source, nn.Module):
        return _of_network(source)
    path = Path(source).expanduser()
    hub_id = None if path.exists() else as_hub_id(str(source))
    if path.is_dir():
        file = _in_folder(path)
    elif hub_id is not None:
        file = fetch_weights(hub_id)
    elif path.exists():
        return _read_file(path, str(source))
    else:
        raise WeightsError(f"there is no file {source}, and no repository of the hub is called so.")
    stored = _read_file(file, str(source))
    if stored.preprocessing is None:  # ours describe themselves
        config = path / "config.json" if hub_id is None else _fetch_config(hub_id)
        if config is not None and config.is_file():
            stored.config = read_config(config)
    return stored


def _of_network(network: nn.Module) -> Stored:
    """A network that is there already: ours, or timm's, which knows how its images were prepared."""
    stored = Stored(f"the given {type(network).__name__}", "a network", network.state_dict())
    if isinstance(network, Xception):
        stored.model, stored.results = model_of(network), network.results
        stored.preprocessing, stored.class_names, stored.loss = network.preprocessing, network.class_names, network.loss
    elif isinstance(getattr(network, "pretrained_cfg", None), Mapping):
        stored.config = {"pretrained_cfg": network.pretrained_cfg}
    return stored


def _fetch_config(hub_id: tuple[str, str | None]) -> Path | None:
    """The repository's configuration; weights that are in the cache can be used where the hub cannot be asked for it."""
    try:
        return fetch(hub_id, "config.json")
    except WeightsError as error:
        warnings.warn(f"{str(error).rstrip('.')}; class names and preprocessing are left out", stacklevel=4)
        return None


def _in_folder(folder: Path) -> Path:
    """The weights in a folder as the hub keeps it, or in that of a finished run."""
    names = (*WEIGHT_FILES, "checkpoints/averaged.safetensors")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise WeightsError(f"the folder {folder} has none of {', '.join(names)}: give the file of weights itself.")
    return found


def _read_file(path: Path, source: str) -> Stored:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise WeightsError(f"{source} cannot be read: {error.strerror}.") from error
    if not head:
        raise WeightsError(f"{source} is empty.")
    if len(head) > 8 and struct.unpack("<Q", head[:8])[0] <= _LONGEST_HEADER and head[8:9] == b"{":
        return read_safetensors(path, source)
    if zipfile.is_zipfile(path):
        return _read_archive(path, source)
    if head[0] == 0x80:  # a pickle of protocol 2 or later
        return read_torch(path, source)
    if head.startswith(_HDF5):
        return read_keras_hdf5(path, source)
    raise WeightsError(f"{source} is no file of weights{_looks_like(head)}.")


def _read_archive(path: Path, source: str) -> Stored:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise WeightsError(f"{source} is damaged: {error}.") from error
    if WEIGHTS_MEMBER in names:
        return read_keras_archive(path, source)
    if any(name.endswith("data.pkl") for name in names):
        return read_torch(path, source)
    inside = ", ".join(names[:3]) or "nothing"
    raise WeightsError(f"{source} is a zip archive without weights that are known here: it holds {inside}.")


def _looks_like(head: bytes) -> str:
    """What a file that is none of weights seems to be."""
    text = head.lstrip().lower()
    if head.startswith(b"PK\x03\x04"):
        return ": it is a zip archive that is cut off; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return ": it is Git LFS's pointer to one; fetch it with git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return ": it is a web page, perhaps the error of a download; fetch it again"
    if head.startswith(b"\x1f\x8b"):
        return ": it is gzip's; unpack it first"
    if head[257:262] == b"ustar":
        return ": it is a tar archive; unpack it first"
    return " that is known here: neither torch, safetensors nor Keras begins so"
