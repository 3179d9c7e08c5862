"""HDF5 without its dangers: the arrays below a group, each no larger than what the file stores."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import h5py
import numpy as np

from xception_pl.weights.stored import WeightsError

_DEEPEST, _MOST_OBJECTS = 12, 20_000
_PACKED = 16  # times: no compression makes more of the bits of weights


@contextmanager
def open_hdf5(file: Path | IO[bytes], source: str) -> Iterator[h5py.File]:
    """An HDF5 file for reading; what goes wrong inside the block becomes a WeightsError."""
    try:
        with h5py.File(file, "r") as opened:
            yield opened
    except WeightsError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError) as error:
        # h5py raises all of these for broken bytes
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise WeightsError(f"{source} is damaged or no HDF5 file: {reason}.") from error


def groups(top: h5py.Group, source: str) -> Iterator[tuple[str, h5py.Group]]:
    """All groups below one, itself included, with their paths, parents before children.

    Raises:
        WeightsError: a link out of the file or to another place in it, or more than any file of weights has.
    """
    pending, seen = [("", top, 0)], 0
    while pending:
        path, group, depth = pending.pop()
        yield path, group
        children = []
        for name in group:
            seen += 1
            if seen > _MOST_OBJECTS or depth > _DEEPEST:
                raise WeightsError(
                    f"{source} is refused: it has more groups than any file of weights, or a circle of them."
                )
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                where = f"the file {link.filename}" if isinstance(link, h5py.ExternalLink) else "another place"
                raise WeightsError(f"{source} is refused: {path}/{name} is a link to {where} instead of an array.")
            if group.get(name, getclass=True) is h5py.Group:
                children.append((f"{path}/{name}".lstrip("/"), group[name], depth + 1))
        pending += reversed(children)


def member(group: h5py.Group, name: str, source: str) -> h5py.Group | h5py.Dataset:
    """What stands under a name, or a path of names, in the file itself.

    Raises:
        WeightsError: there is nothing, or a link to elsewhere.
    """
    inner: Any = group
    for part in name.strip("/").split("/"):
        link = inner.get(part, getlink=True) if isinstance(inner, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise WeightsError(f"{source} is damaged or refused: {group.name} does not itself hold {name}.")
        inner = inner[part]
    return inner


def array(group: h5py.Group, name: str, source: str, *, kind: Literal["f", "u"] = "f") -> np.ndarray[Any, Any]:
    """An array of real numbers, or of bytes (`u`), in the type that it is stored in.

    Raises:
        WeightsError: there is none, its numbers are elsewhere, or it claims to be larger than what is stored of it.
    """
    where = f"{group.name}/{name}".replace("//", "/")
    dataset = member(group, name, source)
    if not isinstance(dataset, h5py.Dataset):
        raise WeightsError(f"{source} is damaged: {where} is no array.")
    if dataset.external or dataset.is_virtual:
        raise WeightsError(f"{source} is refused: the numbers of {where} are in another file.")
    if dataset.dtype.kind != kind:
        wanted = "floating-point numbers" if kind == "f" else "bytes"
        raise WeightsError(f"{source} is damaged: {where} holds {dataset.dtype}, not {wanted}.")
    stored = dataset.id.get_storage_size()
    if dataset.shape is None or dataset.nbytes > _PACKED * stored:
        raise WeightsError(
            f"{source} is refused: {where} claims the shape {dataset.shape} and stores {stored} bytes of it."
        )
    return np.asarray(dataset[()])


def texts(group: h5py.Group, name: str) -> list[str]:
    """An attribute that is a list of texts; Keras splits long ones into `name0`, `name1`, …"""
    if name in group.attrs:
        values = list(group.attrs[name])
    else:
        values, part = [], 0
        while f"{name}{part}" in group.attrs:
            values += list(group.attrs[f"{name}{part}"])
            part += 1
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]
