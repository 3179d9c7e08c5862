"""Predictions as a table, CSV, JSON lines or Parquet; written while they come, whole or not at all."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TextIO

from xception_pl.durable import durable_write
from xception_pl.prediction.pipeline import Outcome

Format = Literal["table", "csv", "jsonl", "parquet"]
ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "table",
}
_ROWS_AT_ONCE = 1024
_NAME_WIDTH = 44


class Writer(Protocol):
    """Takes outcomes that have results, in order."""

    def write(self, outcome: Outcome) -> None: ...


class Table:
    """A line a picture, for reading: its name, then classes with probabilities."""

    def __init__(self, file: TextIO, names: Sequence[str]) -> None:
        self._file, self._names = file, names

    def write(self, outcome: Outcome) -> None:
        found = [
            f"{self._names[index]} {probability:.1%}"
            for index, probability in zip(outcome.classes, outcome.probabilities, strict=True)
        ]
        name = outcome.name if len(outcome.name) <= _NAME_WIDTH else "…" + outcome.name[1 - _NAME_WIDTH :]
        print(f"{name:<{_NAME_WIDTH}}  {'  '.join(found)}", file=self._file, flush=True)


class Csv:
    """Columns `image`, then `class_1`, `name_1`, `probability_1` and so on, then `f0`, `f1`, … of the features."""

    def __init__(self, file: TextIO, names: Sequence[str]) -> None:
        self._lines, self._names, self._headed = csv.writer(file, lineterminator="\n"), names, False

    def write(self, outcome: Outcome) -> None:
        features = [] if outcome.features is None else outcome.features.tolist()
        if not self._headed:
            head = [
                f"{what}_{n}" for n in range(1, 1 + len(outcome.classes)) for what in ("class", "name", "probability")
            ]
            self._lines.writerow(["image", *head, *(f"f{i}" for i in range(len(features)))])
            self._headed = True
        cells: list[Any] = [outcome.name]
        for index, probability in zip(outcome.classes, outcome.probabilities, strict=True):
            cells += [index, self._names[index], f"{probability:.6g}"]
        self._lines.writerow([*cells, *(f"{value:.9g}" for value in features)])


class JsonLines:
    """An object a line: `image`, `predictions` (`class`, `name`, `probability`), and `features` where they were asked for."""

    def __init__(self, file: TextIO, names: Sequence[str]) -> None:
        self._file, self._names = file, names

    def write(self, outcome: Outcome) -> None:
        line: dict[str, Any] = {
            "image": outcome.name,
            "predictions": [
                {"class": index, "name": self._names[index], "probability": probability}
                for index, probability in zip(outcome.classes, outcome.probabilities, strict=True)
            ],
        }
        if outcome.features is not None:
            line["features"] = outcome.features.tolist()
        print(json.dumps(line, ensure_ascii=False), file=self._file)


class Parquet:
    """The columns of `Csv`, but `features` as one column of lists of float32."""

    def __init__(self, file: BinaryIO, names: Sequence[str]) -> None:
        self._file, self._names = file, names
        self._writer: Any = None
        self._rows: list[dict[str, Any]] = []

    def write(self, outcome: Outcome) -> None:
        row: dict[str, Any] = {"image": outcome.name}
        pairs = zip(outcome.classes, outcome.probabilities, strict=True)
        for n, (index, probability) in enumerate(pairs, start=1):
            row |= {f"class_{n}": index, f"name_{n}": self._names[index], f"probability_{n}": probability}
        if outcome.features is not None:
            row["features"] = outcome.features.numpy()
        self._rows.append(row)
        if len(self._rows) == _ROWS_AT_ONCE:
            self._flush()

    def close(self) -> None:
        if self._rows or self._writer is None:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"image": pa.string(), "class": pa.int64(), "name": pa.string(), "probability": pa.float32()}
        columns = list(self._rows[0]) if self._rows else ["image"]
        fields = [(c, pa.list_(pa.float32()) if c == "features" else kinds[c.rpartition("_")[0] or c]) for c in columns]
        table = pa.Table.from_pylist(self._rows, schema=pa.schema(fields))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table)
        self._rows = []


@contextmanager
def opened(path: Path | None, form: Format, names: Sequence[str], stdout: TextIO) -> Iterator[Writer]:
    """A writer to a file, which appears under its name when all is written, or to standard output for None.

    Raises:
        ValueError: Parquet on standard output.
        CannotWrite: the file cannot be written.
    """
    kinds: dict[str, type[Table] | type[Csv] | type[JsonLines]] = {"table": Table, "csv": Csv, "jsonl": JsonLines}
    if path is None:
        if form == "parquet":
            raise ValueError("--format parquet is no text for a terminal: name a file with --output FILE.parquet.")
        yield kinds[form](stdout, names)
        return
    with durable_write(path) as raw:
        if form == "parquet":
            writer = Parquet(raw, names)
            yield writer
            writer.close()
            return
        file = io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
        yield kinds[form](file, names)
        file.detach()
