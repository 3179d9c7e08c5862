"""`metrics.csv`: one row a logged step, appended as it happens, continued by a resumed run."""

import csv
import io
import os
from argparse import Namespace
from pathlib import Path
from typing import Any
from warnings import warn

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from xception_pl.durable import CannotWrite, write_text


class MetricsCsv(Logger):
    """Lightning's CSVLogger deletes the file it finds; a resumed run must go on in it. Columns appear as metrics do."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns = _columns(path)
        self._waiting: list[dict[str, float | None]] = []
        self._warned = False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the recipe lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._waiting.append({"step": step, **metrics})
        try:
            self._write_waiting()
        except OSError as error:  # the weights are worth more than their curve
            if not self._warned:
                warn(f"{error} Rows are kept until it can be.", stacklevel=2)
            self._warned = True

    def _write_waiting(self) -> None:
        new = [name for row in self._waiting for name in row if name not in self._columns]
        if new:
            rows = read_metrics(self.path) if self._columns else []
            self._rewrite(rows, [*self._columns, *dict.fromkeys(new)])
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerows(self._waiting)
        lines = text.getvalue().encode()
        with open(self.path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if file.write(lines) != len(lines):
                os.ftruncate(file.fileno(), size)  # no half a row
                raise CannotWrite(self.path, "the disk is full")
        self._waiting.clear()

    @rank_zero_only
    def drop_after(self, step: int, *, validation: bool = False) -> None:
        """Removes the rows that a run wrote after the checkpoint from which it now resumes.

        Args:
            step: optimiser steps made at the checkpoint.
            validation: the validation of that step is still to come, again if it was written before.
        """
        rows = read_metrics(self.path) if self._columns else []
        kept = [
            row
            for row in rows
            if row["step"] < step or (row["step"] == step and not (validation and "val_loss" in row))
        ]
        if len(kept) < len(rows):
            self._rewrite(kept, self._columns)

    def _rewrite(self, rows: list[dict[str, float]], columns: list[str]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows({name: _exact(value) for name, value in row.items()} for row in rows)
        write_text(self.path, text.getvalue())
        self._columns = columns


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without their empty cells."""
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def _columns(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return next(csv.reader(file), [])


def _exact(value: float) -> float | int:
    return int(value) if value.is_integer() else value
