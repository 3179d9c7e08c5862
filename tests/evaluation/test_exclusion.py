"""Which images a list leaves out."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from tests.prediction.conftest import shipped
from xception_pl.data.errors import DataError
from xception_pl.data.source import Split, open_split, table_split
from xception_pl.evaluation.exclusion import excluded_rows

NAMES = ["ILSVRC2012_val_00000003_n01751748.JPEG", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000020.JPEG"]


def named(names: list[str | None]) -> Split:
    rows = [{"image": {"bytes": shipped(0), "path": name}, "label": 0} for name in names]
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a"])})
    return table_split(Dataset.from_list(rows, features=features), "split 'val' of made", "image", "label")


def excluded(tmp_path: Path, text: str, split: Split, numbers: str = "row") -> list[int]:
    (tmp_path / "list.txt").write_text(text)
    return excluded_rows(tmp_path / "list.txt", split, numbers).tolist()  # type: ignore[arg-type]


def test_rows_and_names(tmp_path: Path) -> None:
    text = "# left out because\n\n2  # a comment\nval/ILSVRC2012_val_00000003\n2\n"
    assert excluded(tmp_path, text, named([*NAMES])) == [0, 2]


@pytest.mark.parametrize("name", [NAMES[0], "ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000003"])
def test_a_name_may_lack_its_ending_and_its_class(tmp_path: Path, name: str) -> None:
    assert excluded(tmp_path, name, named([*NAMES])) == [0]


def test_numbers_of_imagenet(tmp_path: Path) -> None:
    assert excluded(tmp_path, "3\n20\n", named([*NAMES]), "ilsvrc") == [0, 2]


def test_names_of_parquet_are_read_without_the_images(tmp_path: Path) -> None:
    column = [{"bytes": shipped(0), "path": name} for name in NAMES]
    schema = pq.read_schema("xception_pl/data/sample/test.parquet")
    for part, rows in (("0", column[:2]), ("1", column[2:])):
        table = pa.Table.from_pylist([{"image": image, "label": 0} for image in rows], schema=schema)
        pq.write_table(table, tmp_path / f"test-{part}.parquet")
    assert excluded(tmp_path, NAMES[2], open_split(str(tmp_path), "test")) == [2]


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    split = named([*NAMES])
    with pytest.raises(DataError, match=r"1 of 2 lines match no image .* \(3\): rows are counted from 0; .*ilsvrc\?"):
        excluded(tmp_path, "0\n3\n", split)
    with pytest.raises(DataError, match=r"match no image .* \(7\).*should --exclude-numbers be row\?"):
        excluded(tmp_path, "7", split, "ilsvrc")
    with pytest.raises(DataError, match="keeps no file names"):
        excluded(tmp_path, "a.jpg", named([None]))
    with pytest.raises(DataError, match="is the name of 2 images"):
        excluded(tmp_path, "b.jpg", named(["x/b.jpg", "y/b.jpg"]))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        excluded_rows(tmp_path / "gone", split, "row")
