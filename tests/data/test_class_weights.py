"""Weights of classes: from a file line by line, or counted over Parquet and tables alike."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from xception_pl.data.class_weights import label_counts, read_class_weights
from xception_pl.data.config import OUTFITS, DataConfig
from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.data.errors import DataError
from xception_pl.data.outfits import outfits
from xception_pl.data.source import Split, open_split, table_split

LABELS = [[0, 2], [], [2], [1, 2, 3], [0]]
COUNTS = [2.0, 1.0, 3.0, 1.0, 0.0]


def table(labels: list[list[int]]) -> datasets.Dataset:
    images = [{"bytes": b"", "path": None}] * len(labels)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.List(datasets.Value("int64"))})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def parquet(labels: list[list[int]], folder: Path) -> Split:
    table(labels).to_parquet(folder / "train.parquet", batch_size=2)
    return open_split(str(folder / "train.parquet"), "train")


def test_labels_are_counted_in_a_table_and_in_parquet(tmp_path: Path) -> None:
    assert label_counts(table_split(table(LABELS), "here"), 5) == COUNTS
    assert label_counts(parquet(LABELS, tmp_path), 5) == COUNTS


def test_chosen_rows_of_a_table_are_counted_alone() -> None:
    assert label_counts(table_split(table(LABELS).select([3, 4]), "here"), 5) == [1, 1, 1, 1, 0]


def test_the_shipped_set_is_counted() -> None:
    counts = np.bincount(np.concatenate(outfits("test")["label"]), minlength=10)
    assert label_counts(open_split(OUTFITS, "test"), 10) == counts.tolist()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[0, 7]], "has label 7, but the network has 5 classes"),
        ([[-1, 2]], "has label -1, but the network has 5 classes"),
        ([[], []], "No image of"),
    ],
)
def test_labels_that_cannot_be_counted(tmp_path: Path, labels: list[list[int]], expected: str) -> None:
    for split in (table_split(table(labels), "here"), parquet(labels, tmp_path)):
        with pytest.raises(DataError, match=expected):
            label_counts(split, 5)


def test_a_file_has_a_number_a_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_text("1\n0.5\n\n0\n2e3\n")
    assert read_class_weights(path, 4) == [1, 0.5, 0, 2000]
    config = DataConfig(source=OUTFITS, val_split="test", class_weights=str(path))
    assert ImageNetDataModule(config, num_classes=4, multi_label=True).class_weights() == [1, 0.5, 0, 2000]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1\ntwo\n", r"Line 2 of data.class_weights .* is 'two'"),
        ("1\n-2\n", r"Line 2 .* is '-2'"),
        ("inf\n1\n", r"Line 1 .* is 'inf'"),
        ("nan\n1\n", r"Line 1 .* is 'nan'"),
        ("1\n", r"has 1 numbers, but the network has 2 classes"),
        ("1\n2\n3\n", r"has 3 numbers, but the network has 2 classes"),
        ("0\n0\n", r"All numbers of data.class_weights .* are 0"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "weights.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=expected):
        read_class_weights(path, 2)


def test_a_file_that_cannot_be_read_is_named_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_bytes("1\n2\n".encode("utf-16"))
    with pytest.raises(
        DataError, match=r"^data.class_weights .*weights.txt cannot be read \(it is not UTF-8 text\): .*\.$"
    ):
        read_class_weights(path, 2)
    with pytest.raises(DataError, match=r"^data.class_weights .* cannot be read \(No such file or directory\): .*\.$"):
        read_class_weights(tmp_path / "none.txt", 2)


def test_no_weights_are_none() -> None:
    assert ImageNetDataModule(DataConfig(source=OUTFITS), num_classes=10, multi_label=True).class_weights() is None


def test_only_the_label_column_of_parquet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xception_pl.data import stream

    images = [{"bytes": bytes(100_000), "path": None}] * 5
    features = datasets.Features({"image": datasets.Image(), "label": datasets.List(datasets.Value("int64"))})
    made = datasets.Dataset.from_dict({"image": images, "label": LABELS}, features=features)
    pq.write_table(made.with_format("arrow")[:], tmp_path / "train.parquet", compression="none", use_dictionary=False)
    split = open_split(str(tmp_path / "train.parquet"), "train")
    read: list[int] = []
    original = stream.read_range

    def counted(path: str, start: int, stop: int, retry_seconds: float) -> bytes:
        read.append(stop - start)
        return original(path, start, stop, retry_seconds)

    monkeypatch.setattr(stream, "read_range", counted)
    assert label_counts(split, 5) == COUNTS
    assert 0 < sum(read) < 1000
