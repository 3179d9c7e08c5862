"""Planned rows by id, out of Parquet row groups or a `datasets` table, as encoded bytes and labels."""

import contextlib
import functools
import hashlib
import io
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from xception_pl.data.cache import GroupCache, cache_folder, make_folder
from xception_pl.data.errors import DataError
from xception_pl.data.fetch import RETRY_SECONDS, file_size, read_range
from xception_pl.data.source import ParquetSplit, Split, TableSplit

MEMORY_BYTES = 2**30
"""Bound on the row groups that one reader holds."""

_log = logging.getLogger(__name__)

_FOOTER_GUESS = 2**17  # bytes read at a file's end in the first request; most footers are smaller
_GAP = 2**16  # columns nearer than this are read in one request


@dataclass(frozen=True, slots=True)
class Row:
    """One undecoded image."""

    data: bytes
    labels: tuple[int, ...]


class RowReader(Protocol):
    """Fetches rows by id, in any order."""

    def rows(self, ids: Sequence[int]) -> list[Row]: ...


def open_reader(split: Split, retry_seconds: float = RETRY_SECONDS, cache: GroupCache | None = None) -> RowReader:
    """The reader of a split, for one process; a Parquet split's row groups come through the cache if there is one."""
    if isinstance(split, TableSplit):
        return TableReader(split)
    assert isinstance(split, ParquetSplit)
    return ParquetReader(
        split, cache.table if cache else functools.partial(read_group, split, retry_seconds=retry_seconds)
    )


class TableReader:
    """Rows of a `datasets.Dataset`."""

    def __init__(self, split: TableSplit) -> None:
        self._split = split

    def rows(self, ids: Sequence[int]) -> list[Row]:
        table = self._split.table[[int(i) for i in ids]]
        images, labels = table[self._split.image_column], table[self._split.label_column]
        return [Row(self._bytes(image), _as_tuple(label)) for image, label in zip(images, labels, strict=True)]

    def _bytes(self, image: dict[str, Any]) -> bytes:
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        with fsspec.open(image["path"], "rb") as file:
            return bytes(file.read())


class ParquetReader:
    """Rows of Parquet files.

    Holds the row groups used last, `memory_bytes` of them at most; `fetch` brings the others: from the files, or from
    the cache, whose tables are mapped and shared with the other processes of the node.
    """

    def __init__(self, split: ParquetSplit, fetch: Callable[[int], pa.Table], memory_bytes: int = MEMORY_BYTES) -> None:
        self._fetch, self._memory_bytes = fetch, memory_bytes
        self._first_id = np.cumsum(split.rows) - split.rows
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self._held_bytes = 0

    def rows(self, ids: Sequence[int]) -> list[Row]:
        groups = np.searchsorted(self._first_id, np.asarray(ids), side="right") - 1
        out: list[Row | None] = [None] * len(ids)
        for group in np.unique(groups):  # a group at a time: no more than one needs to be held
            table = self._group(int(group))
            images, labels = table.column(0).chunk(0), table.column(1).chunk(0)
            for at in np.flatnonzero(groups == group).tolist():
                row = int(ids[at] - self._first_id[group])
                out[at] = Row(images[row].as_py() or b"", _as_tuple(labels[row].as_py()))
        return [row for row in out if row is not None]

    def _group(self, group: int) -> pa.Table:
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        table = self._fetch(group)
        self._held[group] = table
        self._held_bytes += table.nbytes
        while self._held_bytes > self._memory_bytes and len(self._held) > 1:
            self._held_bytes -= self._held.popitem(last=False)[1].nbytes
        return table


def open_cache(split: Split, folder: str | None, gigabytes: float, retry_seconds: float) -> GroupCache | None:
    """The cache of a split that needs one: remote Parquet, and local Parquet too large to hold in memory."""
    if not isinstance(split, ParquetSplit) or not (split.remote or split.bytes > MEMORY_BYTES):
        return None
    return GroupCache(cache_folder(folder), int(gigabytes * 1e9), split, read_group, retry_seconds)


def read_group(split: ParquetSplit, group: int, retry_seconds: float = RETRY_SECONDS) -> pa.Table:
    """Read one row group: a table of two columns, encoded image and label, one chunk each."""
    table = _read_columns(split, group, (split.image_column, split.label_column), retry_seconds)
    images = table.column(split.image_column).combine_chunks()
    if pa.types.is_struct(images.type):
        images = images.field("bytes")
    labels = table.column(split.label_column).combine_chunks()
    return pa.table([images, labels], names=["image", "label"])


def read_labels(split: ParquetSplit, group: int, retry_seconds: float = RETRY_SECONDS) -> pa.Array:
    """Read the labels, or label lists, of one row group, and no image."""
    table = _read_columns(split, group, (split.label_column,), retry_seconds)
    return table.column(split.label_column).combine_chunks()


def _read_columns(split: ParquetSplit, group: int, columns: Sequence[str], retry_seconds: float) -> pa.Table:
    file, index = split.groups[group]
    footer = split.footers[file]
    leaves = [_leaf(footer, column) for column in columns]
    spans = _spans(footer.row_group(index), leaves)
    parts, end = [], time.monotonic() + retry_seconds
    for start, stop in spans:  # all of them within the time for one
        parts.append((start, read_range(split.files[file], start, stop, max(0.0, end - time.monotonic()))))
    try:
        parquet = pq.ParquetFile(pa.PythonFile(_Parts(parts, footer)), metadata=footer)
        return parquet.read_row_group(index, columns=leaves, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"Row group {index} of {split.files[file]} is damaged, or the file was changed since the run began: "
            "leave it alone while it is read, or copy it again."
        ) from error


def kept_footer(path: str, keep: Path | None) -> pq.FileMetaData:
    """`read_footer`, from the folder `keep` when this commit's file was read before."""
    if keep is None or not path.startswith("hf://"):
        return read_footer(path)
    kept = keep / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.footer"
    with contextlib.suppress(OSError, pa.ArrowException):  # not there, or torn: read and kept again
        return pq.read_metadata(kept)
    footer = read_footer(path)
    make_folder(keep)
    aside = kept.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        footer.write_metadata_file(str(aside))
        aside.rename(kept)
    except OSError as error:  # a full disk: read again the next time
        _log.debug("The footer of %s is not kept: %s", path, error)
        aside.unlink(missing_ok=True)
    return footer


def read_footer(path: str) -> pq.FileMetaData:
    """Metadata of one Parquet file, in one request unless the footer is large.

    Raises:
        DataError: when the file is not Parquet, or is damaged.
    """
    size = file_size(path)
    tail = read_range(path, max(0, size - _FOOTER_GUESS), size)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or length > size:
        raise DataError(f"{path} is not a whole Parquet file: copy it again.")
    if length > len(tail):
        tail = read_range(path, size - length, size)
    try:
        return pq.read_metadata(pa.BufferReader(b"PAR1" + tail[-length:]))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"The footer of the Parquet file {path} is damaged: copy it again.") from error


def _leaf(footer: pq.FileMetaData, column: str) -> str:
    """The stored column to read for a column: of an image {bytes, path} only the bytes."""
    paths = [footer.schema.column(i).path for i in range(footer.num_columns)]
    return f"{column}.bytes" if f"{column}.bytes" in paths else column


def _spans(group: pq.RowGroupMetaData, leaves: Sequence[str]) -> list[tuple[int, int]]:
    """Byte ranges of the stored columns, those close together as one."""
    spans: list[tuple[int, int]] = []
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema in leaves or column.path_in_schema.startswith(tuple(f"{leaf}." for leaf in leaves)):
            start = column.data_page_offset
            if column.has_dictionary_page:
                start = min(start, column.dictionary_page_offset)
            spans.append((start, start + column.total_compressed_size))
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start - merged[-1][1] <= _GAP:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


class _Parts(io.RawIOBase):
    """A file of which only some byte ranges are at hand: what pyarrow needs to read one row group."""

    def __init__(self, parts: list[tuple[int, bytes]], footer: pq.FileMetaData) -> None:
        super().__init__()
        self._parts, self._at = parts, 0
        self._size = max(start + len(data) for start, data in parts) + int(footer.serialized_size) + 8

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self._size

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = int(at)
        return self._at

    def read(self, size: int = -1) -> bytes:
        for start, data in self._parts:
            if start <= self._at < start + len(data):
                piece = data[self._at - start :][: None if size < 0 else size]
                self._at += len(piece)
                return piece
        return b""


def _as_tuple(label: int | Sequence[int] | None) -> tuple[int, ...]:
    if label is None:
        return (-1,)
    return (int(label),) if isinstance(label, int | np.integer) else tuple(int(one) for one in label)


def check_labels(rows: Sequence[Row], ids: npt.NDArray[np.int64], classes: int, where: str) -> None:
    """Raise DataError for the first label outside [0, classes)."""
    for row, at in zip(rows, ids, strict=True):
        for label in row.labels:
            if not 0 <= label < classes:
                hint = "it is unlabelled, use another split" if label < 0 else f"the network has {classes} classes"
                raise DataError(f"Row {at} of {where} has label {label}: {hint}.")
