"""The list of images that could not be decoded, and when there are too many."""

import csv
from pathlib import Path

from xception_pl.data.errors import DataError
from xception_pl.data.item import Corrupt
from xception_pl.data.source import Split


class CorruptImages:
    """Names each corrupt image once in `corrupt.csv` (source, row, reason) and ends the run above an allowance.

    Ranks append to the same file and each holds its own share of the allowance.

    Args:
        split: whose images these are.
        file: the list; None keeps none.
        allowed: images that may be corrupt.
        limit: for the message: where the allowance comes from.
    """

    def __init__(self, split: Split, file: Path | None, allowed: float, limit: str) -> None:
        self._split, self._file, self._allowed, self._limit = split, file, allowed, limit
        self.rows: set[int] = set()

    def __call__(self, found: list[Corrupt]) -> None:
        """Note corrupt images; raises DataError when they are too many."""
        new = [image for image in found if image.row not in self.rows]
        self.rows.update(image.row for image in new)
        if new and self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", newline="") as file:
                lines = csv.writer(file)
                if not file.tell():
                    lines.writerow(("source", "row", "reason"))
                lines.writerows((self._split.where, image.row, image.reason) for image in new)
        if len(self.rows) > self._allowed:
            listed = f"; they are listed in {self._file}" if self._file is not None else ""
            raise DataError(
                f"{len(self.rows)} images of {self._split.where} cannot be decoded, more than {self._limit} allows "
                f"on this rank ({self._allowed:g}){listed}: repair the source or raise the limit."
            )
