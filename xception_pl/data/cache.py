"""Row groups on the local disk: bounded, shared by the processes of a node, filled ahead of use by one process.

A row group is kept as an uncompressed Arrow file that readers map: any row is then found without decoding the
others, and the memory is the page cache, common to all workers. The folder may be shared by jobs, and jobs may be
killed at any time: files appear whole (written aside, then renamed), locks are the kernel's and end with their process,
a torn file is made again, and whoever has mapped a file keeps it when another process deletes it.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from xception_pl.data.errors import DataError
from xception_pl.data.fetch import RETRY_SECONDS
from xception_pl.data.source import ParquetSplit

_STALE_SECONDS = 600  # files written aside that are older belong to a process that died
_ROOM = 0.9  # share of the limit left in use by a clearing, so that not every write needs one

_log = logging.getLogger(__name__)


class GroupCache:
    """The row groups of one split in a folder of limited size.

    Args:
        folder: shared by all splits and jobs; made when missing.
        limit_bytes: of everything in the folder.
        split: whose row groups these are.
        read: brings a row group from the source, trying for so many seconds.
        retry_seconds: for which a row group is tried, the time included in which another process tried.

    Raises:
        DataError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        split: ParquetSplit,
        read: Callable[[ParquetSplit, int, float], pa.Table],
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.retry_seconds = retry_seconds
        self._split, self._read = split, read
        self._groups = folder / _fingerprint(split)
        make_folder(self._groups)
        self._warned = False

    def table(self, group: int) -> pa.Table:
        """A row group, mapped from the folder; fetched first when it is not there."""
        mapped = self._mapped(group)
        if mapped is not None:
            return mapped
        table = self.fill(group)
        if table is None:  # another process brought it meanwhile
            table = self._mapped(group)
        return table if table is not None else self._read(self._split, group, self.retry_seconds)

    def fill(self, group: int) -> pa.Table | None:
        """Fetch a row group unless it is there; while one process fetches it, the others wait.

        Returns the table if this call fetched it: it serves even where the disk had no room for it.
        """
        path = self._path(group)
        if path.exists():
            return None
        lock = path.with_suffix(".lock")
        began = time.monotonic()
        with _locked(lock):
            if path.exists():
                return None
            # Who had the lock may have tried in vain: processes that each tried for as long, one after the other, would
            # outlast every bound.
            waited = time.monotonic() - began
            table = self._read(self._split, group, max(0.0, self.retry_seconds - waited))
            if self._write(table, path):
                # no longer needed: who waits for it will find the file
                lock.unlink(missing_ok=True)
            return table

    def has(self, group: int) -> bool:
        return self._path(group).exists()

    def _path(self, group: int) -> Path:
        return self._groups / f"{group}.arrow"

    def _mapped(self, group: int) -> pa.Table | None:
        path = self._path(group)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            os.utime(path)  # used: the clearing takes the longest unused first
            return table
        except FileNotFoundError:
            return None
        except (pa.ArrowInvalid, OSError):
            path.unlink(missing_ok=True)  # torn, by a crash of the machine: a rename alone is not on the disk
            return None

    def _write(self, table: pa.Table, path: Path) -> bool:
        """Keep a table; False where the disk, or the limit, has no room."""
        for freed in (False, True):
            aside = path.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}.tmp")
            try:
                size = pa.MockOutputStream()
                _write_arrow(table, size)
                if not self._reserve(aside, size.size()):
                    break
                with aside.open("r+b") as file:
                    _write_arrow(table, file)
                aside.rename(path)
                return True
            except OSError as error:
                aside.unlink(missing_ok=True)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if not freed:
                    self._clear(down_to=0.5)
        if not self._warned:
            self._warned = True
            _log.warning("No room in %s: row groups that do not fit are read again when needed.", self.folder)
        return False

    def _reserve(self, aside: Path, size: int) -> bool:
        """Make a file of `size` bytes to write into; when that passes the limit, delete the longest unused first.

        False where it passes the limit all the same: it is larger, or others are writing as much at this moment.

        The bytes are kept in a file, for measuring the folder takes longer than writing a row group.
        """
        if size > self.limit_bytes:
            return False
        with _locked(self.folder / "lock"):
            counter = self.folder / "bytes"
            kept = counter.read_text() if counter.exists() else ""
            used = int(kept) if kept.isdigit() else self._measure()  # a kill, or a full disk, leaves it empty
            if used + size > self.limit_bytes:
                used = self._delete(max(0, int(self.limit_bytes * _ROOM) - size))
            fits = used + size <= self.limit_bytes
            counter.write_text(str(used + size if fits else used))
            if not fits:
                return False
            with aside.open("wb") as file:
                file.truncate(size)  # counts from now on, for whoever measures
        return True

    def _clear(self, down_to: float) -> None:
        with _locked(self.folder / "lock"):
            used = self._delete(int(self._measure() * down_to))
            (self.folder / "bytes").write_text(str(used))

    def _measure(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _delete(self, down_to: int) -> int:
        """Delete the longest unused files until `down_to` bytes are left; returns the bytes left.

        What is being written counts, and stays: its writer is about to rename it.
        """
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used <= down_to:
                break
            if path.suffix == ".tmp":
                continue
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of all that counts; leftovers of dead processes are deleted on the way."""
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix == ".tmp" and time.time() - stat.st_mtime > _STALE_SECONDS:
                    path.unlink()
                elif path.suffix in (".tmp", ".arrow"):
                    yield (stat.st_mtime if path.suffix == ".arrow" else time.time()), stat.st_size, path


def _write_arrow(table: pa.Table, file: Any) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def cache_folder(configured: str | None) -> Path:
    """Where row groups and footers are kept: as configured, or the user's cache folder."""
    if configured is not None:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xception_pl"


def make_folder(folder: Path) -> None:
    """Make a folder within the cache's; raises DataError where that, or writing there or beside it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for written in (folder, folder.parent):
            if not os.access(written, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise DataError(
            f"Nothing can be kept in {folder.parent} ({error.strerror}): "
            "set data.cache_dir to a folder that can be written to."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; the kernel gives it back when the process ends in whatever way."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(split: ParquetSplit) -> str:
    """Names files (a hub file's URL holds its commit), columns and layout: the same for all jobs that share them."""
    digest = hashlib.sha256(f"{split.image_column}\n{split.label_column}\n".encode())
    for file, footer in zip(split.files, split.footers, strict=True):
        digest.update(f"{file} {_stamp(file)} {footer.num_rows} {footer.serialized_size}\n".encode())
    return digest.hexdigest()[:24]


def _stamp(file: str) -> str:
    try:
        stat = os.stat(file)
        return f"{stat.st_size} {stat.st_mtime_ns}"
    except OSError:
        return ""
