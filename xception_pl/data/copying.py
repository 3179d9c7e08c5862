"""A hub dataset as local Parquet: every file whole and verified, or a sentence on why not; interrupted, it goes on.

While it grows, a mirror lies in `FOLDER/.mirror`, which `datasets` does not see: the folder is a source only once all
asked-for splits are there. A file comes in pieces, each tried again for a bounded time, and a piece that arrived is not
asked for again, after a kill either. The commit is fixed by the first start: files of two commits never mix.
"""

import contextlib
import fcntl
import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from xception_pl.data.decode import DecodeError, open_image
from xception_pl.data.errors import DataError
from xception_pl.data.fetch import HubFile, hub_files, read_range
from xception_pl.data.source import hub_parquet

PIECE_BYTES = 2**24
"""Read in one request; a kill costs no more than this for each worker."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are made smaller. Images that are small enough keep their bytes, as do those that cannot be read."""

    side: str
    """`longest` or `shortest`."""
    pixels: int
    """Of that side at most."""
    quality: int = 90
    """Of the JPEG."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be copied; known before a byte of it is read."""

    dataset: str
    revision: str
    """The commit that all files are of."""
    encoding: Encoding | None
    files: dict[str, HubFile]
    """Name in the mirror: file on the hub."""
    folder: Path

    @functools.cached_property
    def bytes(self) -> int:
        """To be transferred in all, for a mirror that starts from nothing."""
        return sum(file.size for file in self.files.values())


@dataclass
class Record:
    """What `.mirror/state.json` keeps: of what the mirror is, and each file that is finished and verified."""

    dataset: str
    revision: str
    encoding: dict[str, Any] | None
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    """Name: `bytes`, `rows`, and `kept`: images that could not be read and stay as they are."""


@dataclass(frozen=True)
class Result:
    """What a finished mirror holds."""

    files: int
    rows: int
    bytes: int
    unreadable: int
    """Images that could not be re-encoded: they are as they were on the hub."""


def plan_mirror(
    dataset: str, folder: Path, revision: str | None, splits: Sequence[str], encoding: Encoding | None
) -> Plan:
    """Resolve a dataset to one commit's files, or go on with the commit that a folder was begun with.

    Raises:
        DataError: the dataset, revision or split is not there or is not Parquet; or the folder holds something else.
    """
    begun = _recorded(folder)
    if begun is not None:
        _same(begun, dataset, encoding, folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty and no mirror was begun there: name another folder.")
    found = hub_parquet(dataset, revision if revision is not None or begun is None else begun.revision)
    missing = [split for split in splits if split not in found]
    if missing:
        raise DataError(f"There is no split {missing[0]!r} in {dataset} (it has {', '.join(found)}): correct --split.")
    names = {
        f"{split}-{number:05d}-of-{len(urls):05d}.parquet": url
        for split, urls in found.items()
        if split in splits or not splits
        for number, url in enumerate(urls)
    }
    commit, files = hub_files(list(names.values()))
    if begun is not None and begun.revision != commit:
        raise DataError(
            f"{folder} was begun with commit {begun.revision} of {dataset}, and the revision asked for is {commit}: "
            "give the first as --revision, or name another folder."
        )
    made = dict(zip(names, files, strict=True))
    return Plan(dataset=dataset, revision=commit, encoding=encoding, files=made, folder=folder)


def mirror(plan: Plan, workers: int, told: Callable[[int], None]) -> Result:
    """Copy what is missing, `workers` files at a time; `told` hears of bytes that are there, from several threads.

    Raises:
        DataError: a file cannot be read or is not what the hub says, the disk is full, or another process is at it.
    """
    hidden, shown = plan.folder / ".mirror", plan.folder / "data"
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        with _alone(hidden / "lock", plan.folder):
            encoding = asdict(plan.encoding) if plan.encoding else None
            record = _recorded(plan.folder) or Record(plan.dataset, plan.revision, encoding)
            _write_record(plan.folder, record)
            _need_room(plan, record)
            _copy_all(plan, record, workers, told)
            shown.mkdir(exist_ok=True)
            for name in plan.files:
                if (hidden / name).exists():
                    (hidden / name).rename(shown / name)
    except OSError as error:
        raise DataError(
            f"{plan.folder} cannot be written: {error.strerror or error}; make room or mend it, "
            "then start again: what is there is kept."
        ) from error
    done = [record.files[name] for name in plan.files]
    totals = {key: sum(file[key] for file in done) for key in ("rows", "bytes", "kept")}
    return Result(len(done), totals["rows"], totals["bytes"], totals["kept"])


def _copy_all(plan: Plan, record: Record, workers: int, told: Callable[[int], None]) -> None:
    writing, stop = threading.Lock(), threading.Event()

    def one(name: str, file: HubFile) -> None:
        if _finished(plan, record, name):
            told(file.size)
            return
        done = _copy(plan, name, file, told, stop)
        with writing:
            record.files[name] = done
            _write_record(plan.folder, record)
        (plan.folder / ".mirror" / f"{name}.part").unlink(missing_ok=True)

    with ThreadPoolExecutor(workers) as pool:
        try:
            copies = [pool.submit(one, name, file) for name, file in plan.files.items()]
            wait(copies, return_when=FIRST_EXCEPTION)
            for copy in copies:
                if copy.done():
                    copy.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Another file failed, or the user had enough."""


def _copy(plan: Plan, name: str, file: HubFile, told: Callable[[int], None], stop: threading.Event) -> dict[str, int]:
    """Bring one file, verify it, re-encode it; it is then at its place in `.mirror`."""
    hidden = plan.folder / ".mirror"
    part, whole = hidden / f"{name}.part", hidden / name
    for again in (True, False):
        _bring(file, part, told, stop)
        if file.matches(part):
            break
        told(-file.size)
        part.unlink()  # a crash of the machine can leave a file's end unwritten: once more, from nothing
        if not again:
            raise DataError(f"{file.url} differs from the checksum that the hub gives for it: try again later.")
    rows, kept = pq.read_metadata(part).num_rows, 0
    if plan.encoding is None:
        part.rename(whole)
    else:
        aside = hidden / f"{name}.small"
        kept = _reencode(part, aside, plan.encoding, file.url, stop)
        written = pq.read_metadata(aside).num_rows
        if written != rows:
            raise DataError(f"{aside} has {written} rows and {file.url} has {rows}: start again.")
        aside.rename(whole)
    return {"bytes": whole.stat().st_size, "rows": rows, "kept": kept}


def _bring(file: HubFile, part: Path, told: Callable[[int], None], stop: threading.Event) -> None:
    """The file's bytes, going on behind those that are there."""
    with part.open("ab") as out:
        at = out.tell()
        told(min(at, file.size))
        while at < file.size:
            if stop.is_set():
                raise _Stopped
            piece = read_range(file.url, at, min(at + PIECE_BYTES, file.size))
            out.write(piece)
            out.flush()
            at += len(piece)
            told(len(piece))
        os.fsync(out.fileno())


def _reencode(source: Path, target: Path, encoding: Encoding, where: str, stop: threading.Event) -> int:
    """The same rows with smaller images, a row group at a time; returns how many images could not be read."""
    from datasets import Features
    from datasets import Image as ImageFeature

    parquet, unreadable = pq.ParquetFile(source), 0
    schema = parquet.schema_arrow
    kinds = Features.from_arrow_schema(schema)
    columns = [name for name, kind in kinds.items() if isinstance(kind, ImageFeature)]
    if not columns:
        raise DataError(f"{where} has no column of images: leave --longest and --shortest out.")
    with pq.ParquetWriter(target, schema) as writer:
        for group in range(parquet.num_row_groups):
            if stop.is_set():
                raise _Stopped
            table = parquet.read_row_group(group, use_threads=False)
            for name in columns:
                images = table.column(name).to_pylist()
                for image in images:
                    if image and image["bytes"]:
                        try:
                            image["bytes"] = smaller(image["bytes"], encoding)
                        except DecodeError:
                            unreadable += 1
                place = table.schema.get_field_index(name)
                table = table.set_column(place, schema.field(name), pa.array(images, schema.field(name).type))
            writer.write_table(table, row_group_size=max(1, len(table)))
    return unreadable


def smaller(data: bytes, encoding: Encoding) -> bytes:
    """An image as a JPEG whose longest or shortest side is `encoding.pixels`; the same bytes where it is no more.

    Resized with Pillow's Lanczos filter; colours and orientation as in `decode`.

    Raises:
        DecodeError: the bytes cannot be read.
    """
    image = open_image(data, 3)
    side = max(image.size) if encoding.side == "longest" else min(image.size)
    if side <= encoding.pixels:
        return data
    width, height = (max(1, round(length * encoding.pixels / side)) for length in image.size)
    out = BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(out, "JPEG", quality=encoding.quality)
    return out.getvalue()


# What is there already


def _recorded(folder: Path) -> Record | None:
    try:
        return Record(**json.loads((folder / ".mirror" / "state.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write_record(folder: Path, record: Record) -> None:
    aside = folder / ".mirror" / "state.tmp"
    aside.write_text(json.dumps(asdict(record), indent=1))
    aside.rename(folder / ".mirror" / "state.json")


def _same(begun: Record, dataset: str, encoding: Encoding | None, folder: Path) -> None:
    asked = asdict(encoding) if encoding else None
    if (begun.dataset, begun.encoding) != (dataset, asked):
        raise DataError(
            f"{folder} holds a mirror of {begun.dataset} with {_in_words(begun.encoding)}, not of {dataset} with "
            f"{_in_words(asked)}: name another folder."
        )


def _in_words(encoding: dict[str, Any] | None) -> str:
    return "--{side} {pixels} --quality {quality}".format(**encoding) if encoding else "images as they are"


def _finished(plan: Plan, record: Record, name: str) -> bool:
    done = record.files.get(name)
    places = [plan.folder / "data" / name, plan.folder / ".mirror" / name]
    if done is not None and any(place.exists() and place.stat().st_size == done["bytes"] for place in places):
        return True
    for place in places:  # not what was recorded, or killed before it was: made again, or verified again
        if place.exists() and plan.encoding is None:
            place.rename(plan.folder / ".mirror" / f"{name}.part")
    return False


def _need_room(plan: Plan, record: Record) -> None:
    """Raise DataError where the disk cannot hold what is still to come; re-encoded images' size is not known before."""
    if plan.encoding is not None:
        return
    parts = [plan.folder / ".mirror" / f"{name}.part" for name in plan.files]
    there = sum(part.stat().st_size for part in parts if part.exists())
    need = sum(file.size for name, file in plan.files.items() if name not in record.files) - there
    free = shutil.disk_usage(plan.folder).free
    if need > free:
        raise DataError(
            f"{need / 1e9:.1f} GB are to come and {plan.folder} has room for {free / 1e9:.1f} GB: make room, name a "
            "folder on another disk, or make the images smaller with --shortest."
        )


@contextlib.contextmanager
def _alone(lock: Path, folder: Path) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"Another process is mirroring to {folder}: wait for it.") from error
        yield
