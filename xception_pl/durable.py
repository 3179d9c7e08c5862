"""Files that are written whole or not at all, whatever is killed and whatever fills up. Imports no library; any room may use it."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class CannotWrite(OSError):
    """A file could not be written, and what stood in its place still does. The message is one sentence for the user."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be written: {reason}; what was there before is untouched.")
        self.path = path


@contextmanager
def durable_write(path: Path, *, check: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` once the block has ended and everything is on the disk.

    Written beside the target (`path.partial`), flushed to the disk, checked, renamed, and the folder flushed: after a
    kill or a power cut at any moment `path` is the old file or the new one. Missing parent folders are made.

        with durable_write(path) as file:
            file.write(content)

    Args:
        path: The target.
        check: Reads the written file back before it replaces the target; raises what it finds wrong.

    Raises:
        CannotWrite: a full disk, a read-only folder, a file that does not read back.
    """
    partial = path.with_name(path.name + ".partial")
    raw: _File | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _File(partial, "wb")
        with io.BufferedWriter(raw) as file:  # type: ignore[type-var]
            yield file
            file.flush()
            os.fsync(raw.fileno())
            os.posix_fadvise(
                raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
            )  # so that the check reads the disk, not the cache
        if check is not None:
            _read_back(path, partial, check)
        os.replace(partial, path)
        _flush_folder(path.parent)
    except BaseException as error:
        _remove(partial)
        cause = error if isinstance(error, OSError) else raw.failure if raw is not None else None
        if cause is None or isinstance(error, CannotWrite):
            raise
        raise CannotWrite(path, cause.strerror or str(cause)) from error


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 durably.

    Raises:
        CannotWrite: as `durable_write`.
    """
    with durable_write(path) as file:
        file.write(text.encode())


class _File(io.FileIO):
    """Remembers why a write failed: torch.save turns any failure into one about positions in its archive."""

    failure: OSError | None = None

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        try:
            return super().write(data) or 0
        except OSError as error:
            self.failure = error
            raise


def _read_back(path: Path, partial: Path, check: Callable[[Path], None]) -> None:
    try:
        check(partial)
    except Exception as error:
        raise CannotWrite(path, f"it does not read back ({str(error).splitlines()[0]})") from error


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that flush no folders
            raise
    finally:
        os.close(opened)


def _remove(partial: Path) -> None:
    with suppress(OSError):  # where nothing can be written nothing can be removed
        partial.unlink(missing_ok=True)
