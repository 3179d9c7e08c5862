"""Images that are left out because a file says so, such as ImageNet's blacklist, without which the paper's Table 1 was measured."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from xception_pl.data.errors import DataError
from xception_pl.data.source import ParquetSplit, Split, TableSplit

Numbers = Literal["row", "ilsvrc"]
_ILSVRC = re.compile(r"ILSVRC2012_val_0*(\d+)")


def excluded_rows(file: Path, split: Split, numbers: Numbers) -> npt.NDArray[np.int64]:
    """Rows of a split that a file names.

    One image a line; empty lines and what follows a `#` do not count. A line is

    - the name of an image's file, with or without folders and ending: `ILSVRC2012_val_00000123.JPEG`,
      `val/ILSVRC2012_val_00000123`. Names that go on behind an underscore match too, as those of the hub's copy do
      (`ILSVRC2012_val_00000123_n01751748.JPEG`);
    - a whole number. With `numbers="row"` it is a row of the split, counted from 0; with `"ilsvrc"` the number in the
      file name of ImageNet's validation images, counted from 1, which is how ILSVRC2014's
      `…_clsloc_validation_blacklist.txt` lists them.

    Raises:
        DataError: the file cannot be read, or a line matches no image or more than one.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--exclude {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    wanted = [line for line in lines if line]
    rows: list[int] = []
    unmatched: list[str] = []
    known: dict[str, list[int]] | None = None
    for line in wanted:
        if line.isdecimal() and numbers == "row":
            found = [int(line)] if int(line) < split.images else []
        else:
            known = _rows_by_name(split) if known is None else known
            found = known.get(f"#{int(line)}" if line.isdecimal() else Path(line).stem, [])
        if len(found) > 1:
            raise DataError(f"--exclude {file}: {line} is the name of {len(found)} images of {split.where}: give rows.")
        rows += found
        unmatched += [] if found else [line]
    if unmatched:
        listed = ", ".join(unmatched[:3]) + (", …" if len(unmatched) > 3 else "")
        raise DataError(
            f"--exclude {file}: {len(unmatched)} of {len(wanted)} lines match no image of {split.where} ({listed}): "
            + ("rows are counted from 0; " if numbers == "row" else "")
            + "is it the list of another split, or should --exclude-numbers be "
            + ("ilsvrc?" if numbers == "row" else "row?")
        )
    return np.unique(np.array(rows, np.int64))


def _rows_by_name(split: Split) -> dict[str, list[int]]:
    """Rows by file name without its ending; by what precedes a WordNet id; and by `#NUMBER` of ImageNet's names."""
    rows: dict[str, list[int]] = {}
    nameless = True
    for row, path in enumerate(_paths(split)):
        if path is None:
            continue
        nameless = False
        stem = Path(path).stem
        number = _ILSVRC.match(stem)
        keys = {stem, re.sub(r"_n\d{8}$", "", stem)} | ({f"#{int(number[1])}"} if number else set())
        for key in keys:
            rows.setdefault(key, []).append(row)
    if nameless:
        raise DataError(f"{split.where} keeps no file names of its images: list rows, counted from 0, in --exclude.")
    return rows


def _paths(split: Split) -> Iterable[str | None]:
    """The stored path of each image, in order."""
    if isinstance(split, TableSplit):
        return [image["path"] for image in split.table[split.image_column]]
    assert isinstance(split, ParquetSplit)
    import fsspec

    found: list[str | None] = []
    for url in split.files:
        with fsspec.open(url, "rb") as file:
            table = pq.ParquetFile(file).read(columns=[f"{split.image_column}.path"])
        if split.image_column not in table.column_names:
            return [None] * split.images
        found += [image["path"] if image is not None else None for image in table[split.image_column].to_pylist()]
    return found
