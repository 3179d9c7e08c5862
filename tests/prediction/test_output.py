"""The four formats say the same, and a file is whole or not there."""

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from xception_pl.durable import CannotWrite
from xception_pl.prediction.names import class_names, imagenet_names
from xception_pl.prediction.output import Format, opened
from xception_pl.prediction.pipeline import Outcome

NAMES = ["cat", "dög, brown"]
FOUND = [
    Outcome(name="a.jpg", classes=(1, 0), probabilities=(0.75, 0.25), features=torch.tensor([0.5, -1.0])),
    Outcome(name="b/c, d.png", classes=(0, 1), probabilities=(0.6, 0.4), features=torch.tensor([2.0**-30, 3.0])),
]


def written(path: Path, form: Format) -> Path:
    with opened(path, form, NAMES, io.StringIO()) as writer:
        for outcome in FOUND:
            writer.write(outcome)
    return path


def test_csv(tmp_path: Path) -> None:
    rows = list(csv.DictReader(written(tmp_path / "out.csv", "csv").open(encoding="utf-8", newline="")))
    assert rows[0] == {
        "image": "a.jpg", "class_1": "1", "name_1": "dög, brown", "probability_1": "0.75",
        "class_2": "0", "name_2": "cat", "probability_2": "0.25", "f0": "0.5", "f1": "-1",
    }  # fmt: skip
    assert (rows[1]["image"], float(rows[1]["f0"])) == ("b/c, d.png", pytest.approx(2.0**-30, rel=1e-7))


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in written(tmp_path / "out.jsonl", "jsonl").read_text().splitlines()]
    assert lines[0] == {
        "image": "a.jpg",
        "predictions": [
            {"class": 1, "name": "dög, brown", "probability": 0.75},
            {"class": 0, "name": "cat", "probability": 0.25},
        ],
        "features": [0.5, -1.0],
    }


def test_parquet(tmp_path: Path) -> None:
    table = pq.read_table(written(tmp_path / "new" / "out.parquet", "parquet"))
    assert table.column_names == [
        "image", "class_1", "name_1", "probability_1", "class_2", "name_2", "probability_2", "features",
    ]  # fmt: skip
    assert table["class_1"].to_pylist() == [1, 0]
    assert table["features"].to_pylist()[0] == [0.5, -1.0]


def test_parquet_of_many_rows_and_of_none(tmp_path: Path) -> None:
    with opened(tmp_path / "many.parquet", "parquet", NAMES, io.StringIO()) as writer:
        for n in range(2500):
            writer.write(Outcome(name=str(n), classes=(0,), probabilities=(1.0,)))
    assert pq.read_table(tmp_path / "many.parquet")["image"].to_pylist() == [str(n) for n in range(2500)]
    with opened(tmp_path / "none.parquet", "parquet", NAMES, io.StringIO()):
        pass
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


def test_the_table_is_for_people() -> None:
    text = io.StringIO()
    with opened(None, "table", NAMES, text) as writer:
        for outcome in FOUND:
            writer.write(outcome)
    assert text.getvalue().splitlines()[0].split("  ")[0] == "a.jpg"
    assert text.getvalue().splitlines()[0].endswith("  dög, brown 75.0%  cat 25.0%")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_an_interrupted_file_is_not_there(tmp_path: Path, form: Format) -> None:
    path = tmp_path / "out"
    path.write_text("before")

    def stopped() -> None:
        with opened(path, form, NAMES, io.StringIO()) as writer:
            writer.write(FOUND[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--output FILE\.parquet"), opened(None, "parquet", NAMES, io.StringIO()):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot be written"):
        written(tmp_path / "file" / "out.csv", "csv")


def test_class_names() -> None:
    names = imagenet_names()
    assert (names[0], names[1], names[999], len(set(names))) == ("tench", "goldfish", "toilet tissue", 1000)
    assert (names[134], names[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert class_names(None, 1000) == names
    assert class_names(None, 3) == ["0", "1", "2"]
    assert class_names(["a", "b"], 2) == ["a", "b"]
