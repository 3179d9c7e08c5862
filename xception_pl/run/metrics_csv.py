"""`metrics.csv`: one row a logged step, appended as it happens, continued by a resumed run."""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from xception_pl.durable import write_text


class MetricsCsv(Logger):
    """Lightning's CSVLogger deletes the file it finds; a resumed run must go on in it. Columns appear as metrics do."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns = _columns(path)

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
        row = {"step": step, **metrics}
        new = [name for name in row if name not in self._columns]
        if new:
            rows = read_metrics(self.path) if self._columns else []
            self._columns += new
            self._rewrite(rows)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Removes the rows that a run wrote after the checkpoint from which it now resumes."""
        rows = read_metrics(self.path) if self._columns else []
        if any(row["step"] > step for row in rows):
            self._rewrite([row for row in rows if row["step"] <= step])

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows({name: _exact(value) for name, value in row.items()} for row in rows)
        write_text(self.path, text.getvalue())


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
