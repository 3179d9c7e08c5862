"""Which pictures are meant: files, folders, patterns, lists and datasets, in the order they were named."""

import glob
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from PIL import Image

from xception_pl.data.config import OUTFITS, SAMPLE
from xception_pl.data.errors import DataError

if TYPE_CHECKING:
    from xception_pl.data.source import Split

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Picture:
    """One picture, not yet read."""

    name: str
    """Its path, or `SPLIT:ROW` of a dataset."""
    read: Callable[[], bytes]
    """Its encoded bytes; raises OSError or DataError."""


class Files:
    """Pictures that are files of their own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Picture]:
        return (Picture(str(path), path.read_bytes) for path in self.paths)


class Rows:
    """The rows of a dataset's split, read some at a time."""

    def __init__(self, split: "Split") -> None:
        self.split = split

    def __len__(self) -> int:
        return self.split.images

    def __iter__(self) -> Iterator[Picture]:
        from xception_pl.data.stream import open_reader

        reader = open_reader(self.split)
        for first in range(0, len(self), _ROWS_AT_ONCE):
            ids = range(first, min(first + _ROWS_AT_ONCE, len(self)))
            for row, content in zip(ids, reader.rows(ids), strict=True):
                yield Picture(f"{self.split.where}:{row}", lambda data=content.data: data)  # type: ignore[misc]


Pictures = Files | Rows


def find_pictures(arguments: Iterable[str], *, split: str = "test", stdin: TextIO | None = None) -> list[Pictures]:
    """What each argument means.

    - a file: itself, whatever it is called;
    - a folder: the pictures in it and below it, by path;
    - a pattern with `*`, `?` or `[`: what it matches, by path (`**` for folders below);
    - `-`: a path a line on standard input;
    - `sample` or an id `OWNER/NAME` of `datasets`: the rows of one split.

    A file that is not there is found out when it is read, with those that cannot be decoded.

    Raises:
        DataError: a folder or a pattern without pictures, or a dataset that cannot be opened.
    """
    found: list[Pictures] = []
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            lines = (line.strip() for line in (stdin or sys.stdin))
            found.append(Files([Path(line) for line in lines if line]))
        elif path.is_dir():
            found.append(Files(_pictures_below(path)))
        elif path.exists():
            found.append(Files([path]))
        elif glob.has_magic(argument):
            matched = sorted(Path(match) for match in glob.glob(argument, recursive=True))
            files = [match for match in matched if match.is_file()]
            if not files:
                raise DataError(f"No file matches {argument}: check the pattern, and that the shell did not change it.")
            found.append(Files(files))
        elif argument in (SAMPLE, OUTFITS) or _is_dataset_id(argument):
            from xception_pl.data.source import open_split

            found.append(Rows(open_split(argument, split)))
        else:
            found.append(Files([path]))
    return found


def _is_dataset_id(argument: str) -> bool:
    """OWNER/NAME without a picture's ending: `cats/tom.jpg` is a file that is missing."""
    owner, slash, name = argument.partition("/")
    return bool(owner and slash and name) and "/" not in name and Path(name).suffix.lower() not in _endings()


def _pictures_below(folder: Path) -> list[Path]:
    endings = _endings()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not files:
        raise DataError(
            f"There are no pictures in {folder}: name a folder with files that end in .jpg, .png or the like."
        )
    return files


def _endings() -> frozenset[str]:
    """Of the kinds of picture that Pillow opens, without those that are documents or films."""
    Image.init()
    other = {".pdf", ".ps", ".eps", ".mpg", ".mpeg", ".h5", ".hdf"}
    return frozenset(ending for ending, kind in Image.EXTENSION.items() if kind in Image.OPEN) - other
