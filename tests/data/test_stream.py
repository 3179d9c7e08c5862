"""Sources and rows: what is read is what was written, from every kind of source, and mistakes are one sentence."""

import functools
import io
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.tracing import CLASSES, features, png, table
from xception_pl.data import stream
from xception_pl.data.errors import DataError
from xception_pl.data.source import ParquetSplit, open_split, table_split
from xception_pl.data.stream import ParquetReader, check_labels, open_reader, read_group


def write_parquet(folder: Path, name: str, rows: range, group: int = 7, **options: object) -> None:
    part = datasets.Dataset.from_dict(
        {
            "before": ["x" * 3000] * len(rows),  # a column that is not wanted, between those that are
            "image": [{"bytes": png(i), "path": f"{i}.png"} for i in rows],
            "between": [np.random.default_rng(i).bytes(9000) for i in rows],
            "label": [i % CLASSES for i in rows],
        },
        features=datasets.Features(
            {
                "before": datasets.Value("string"),
                "image": datasets.Image(),
                "between": datasets.Value("binary"),
                "label": features()["label"],
            }
        ),
    )
    folder.mkdir(exist_ok=True)
    pq.write_table(part.data.table, folder / name, row_group_size=group, **options)


@pytest.mark.parametrize(
    "options", [{}, {"compression": "zstd"}, {"compression": "none", "use_dictionary": False}], ids=str
)
def test_a_folder_of_parquet_gives_every_row_by_id(tmp_path: Path, options: dict[str, object]) -> None:
    folder = tmp_path / "set"
    for i in range(3):
        write_parquet(folder, f"train-{i:05d}-of-00003.parquet", range(20 * i, 20 * i + 20), **options)
    split = open_split(str(folder), "train")
    assert isinstance(split, ParquetSplit)
    assert split.rows.tolist() == [7, 7, 6] * 3
    ids = np.random.default_rng(0).permutation(60)
    rows = open_reader(split).rows(ids.tolist())
    assert [row.data for row in rows] == [png(i) for i in ids]
    assert [row.labels for row in rows] == [(i % CLASSES,) for i in ids]


def test_only_the_wanted_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "set", "train.parquet", range(40), group=40)
    split = open_split(str(tmp_path / "set"), "train")
    read: list[int] = []
    whole = stream.read_range

    def counted(path: str, start: int, stop: int, retry_seconds: float) -> bytes:
        read.append(stop - start)
        return whole(path, start, stop, retry_seconds)

    monkeypatch.setattr(stream, "read_range", counted)
    open_reader(split).rows(list(range(40)))
    assert len(read) == 2
    assert sum(read) < 0.1 * (tmp_path / "set/train.parquet").stat().st_size


def test_columns_that_lie_apart_are_tried_for_no_longer_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "set", "train.parquet", range(40), group=40)
    split = open_split(str(tmp_path / "set"), "train")
    tried: list[float] = []
    whole = stream.read_range

    def slow(path: str, start: int, stop: int, retry_seconds: float) -> bytes:
        tried.append(retry_seconds)
        time.sleep(0.1)
        return whole(path, start, stop, retry_seconds)

    monkeypatch.setattr(stream, "read_range", slow)
    open_reader(split, retry_seconds=100).rows([0])
    first, second = tried
    assert 90 < second <= first - 0.1 <= 99.9


def test_memory_is_bounded_by_bytes_and_rows_still_come(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set", "train.parquet", range(70))
    split = open_split(str(tmp_path / "set"), "train")
    assert isinstance(split, ParquetSplit)
    reader = ParquetReader(split, functools.partial(read_group, split), memory_bytes=2000)
    for i in np.random.default_rng(0).permutation(70).tolist():
        assert reader.rows([i])[0].data == png(i)
        assert sum(group.nbytes for group in reader._held.values()) <= 2000
    assert len(reader._held) > 1


def test_an_image_folder_a_saved_dataset_arrow_files_and_one_in_memory_give_the_same_rows(tmp_path: Path) -> None:
    made = table(20)
    for i in range(20):
        place = tmp_path / "images/train" / f"class {i % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03d}.png").write_bytes(png(i))
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    (tmp_path / "arrow").mkdir()
    for shard in range(2):
        kept = str(tmp_path / "arrow" / f"train-{shard:05d}-of-00002.arrow")
        made.shard(2, shard, contiguous=True).map(lambda row: row, cache_file_name=kept)
    splits = [
        open_split(str(tmp_path / "images"), "train"),
        open_split(str(tmp_path / "saved"), "train"),
        open_split(str(tmp_path / "arrow"), "train"),
        table_split(made, "in memory"),
    ]
    wanted = sorted((png(i), (i % CLASSES,)) for i in range(20))
    for split in splits:
        assert split.images == 20
        assert split.labels.names == tuple(f"class {i}" for i in range(CLASSES))
        rows = open_reader(split).rows(list(range(20)))
        assert sorted((row.data, row.labels) for row in rows) == wanted


def test_label_lists_are_kept(tmp_path: Path) -> None:
    lists = [[0, 3], [], [9]]
    made = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(i), "path": None} for i in range(3)], "label": lists},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.List(features()["label"])}),
    )
    pq.write_table(made.data.table, tmp_path / "train.parquet")
    for split in (table_split(made, "here"), open_split(str(tmp_path / "train.parquet"), "train")):
        assert split.labels.multi
        assert [row.labels for row in open_reader(split).rows([2, 0, 1])] == [(9,), (0, 3), ()]


def test_plain_columns_without_datasets_features_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [png(1), png(2)], "cls": [4, 5]}), tmp_path / "train.parquet")
    split = open_split(str(tmp_path / "train.parquet"), "train", image_column="jpg", label_column="cls")
    assert split.labels.names is None
    assert [(row.data, row.labels) for row in open_reader(split).rows([1, 0])] == [(png(2), (5,)), (png(1), (4,))]


def one_sentence(error: pytest.ExceptionInfo[DataError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_mistakes_are_one_sentence_each(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as error:
        open_split(str(tmp_path / "nowhere"), "train")
    one_sentence(error)
    with pytest.raises(DataError, match=r"no split 'tain' in sample \(nearest: 'train'") as error:
        open_split("sample", "tain")
    one_sentence(error)
    with pytest.raises(DataError, match=r"no column 'lable' .*\(nearest: 'label'.*data.label_column") as error:
        open_split("sample", "train", label_column="lable")
    one_sentence(error)
    with pytest.raises(DataError, match=r"no column 'picture' .*data.image_column") as error:
        open_split("sample", "train", image_column="picture")
    one_sentence(error)
    with pytest.raises(DataError, match="not class numbers") as error:
        open_split("sample", "train", label_column="image")
    one_sentence(error)
    with pa.ipc.new_file(tmp_path / "train.arrow", pa.schema({"image": pa.binary()})):
        pass  # Arrow's other format
    with pytest.raises(DataError, match=r"not one set in Arrow's stream format.*Parquet") as error:
        open_split(str(tmp_path), "train")
    one_sentence(error)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match="not a whole Parquet file") as error:
        open_split(str(tmp_path / "torn.parquet"), "train")
    one_sentence(error)


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("text", ["{}", "[]", "torn {", '{"splits": ["train"]}'])
def test_a_folder_that_only_looks_like_a_saved_dataset_is_one_sentence(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"no whole dataset saved|There is no split 'train' in") as error:
        open_split(str(tmp_path), "train")
    assert str(tmp_path) in one_sentence(error)


def test_a_saved_dataset_that_lost_a_file_is_one_sentence(tmp_path: Path) -> None:
    table(3).save_to_disk(tmp_path / "saved")
    for name, text in (("state.json", "[]"), ("state.json", "{}"), ("dataset_info.json", None)):
        kept = (tmp_path / "saved" / name).read_text()
        (tmp_path / "saved" / name).write_text(text) if text else (tmp_path / "saved" / name).unlink()
        with pytest.raises(DataError, match="no whole dataset saved") as error:
            open_split(str(tmp_path / "saved"), "train")
        one_sentence(error)
        (tmp_path / "saved" / name).write_text(kept)
    assert open_split(str(tmp_path / "saved"), "train").images == 3


@pytest.mark.parametrize(
    ("start", "stop", "says"),
    [(-350, -200, "The footer of the Parquet file .* is damaged"), (-5, -4, "is not a whole Parquet file")],
)
def test_a_damaged_footer_is_one_sentence_that_names_the_file(tmp_path: Path, start: int, stop: int, says: str) -> None:
    write_parquet(tmp_path / "set", "train.parquet", range(20))
    file = tmp_path / "set" / "train.parquet"
    data = bytearray(file.read_bytes())
    data[start:stop] = b"\xff" * (stop - start)
    file.write_bytes(data)
    with pytest.raises(DataError, match=says) as error:
        open_split(str(tmp_path / "set"), "train")
    assert str(file) in one_sentence(error)


def test_a_file_that_changes_under_a_reader_is_one_sentence(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set", "train.parquet", range(20))
    split = open_split(str(tmp_path / "set"), "train")
    file = tmp_path / "set" / "train.parquet"
    file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(DataError, match=r"Row group 0 of .*train.parquet is damaged, or the file was changed") as error:
        open_reader(split).rows([0])
    one_sentence(error)


@pytest.mark.parametrize(("label", "says"), [(-1, "unlabelled"), (10, "has 10 classes")])
def test_labels_outside_the_classes_are_refused(label: int, says: str) -> None:
    made = table(3).cast_column("label", datasets.Value("int64"))
    made = made.remove_columns("label").add_column("label", [0, label, 1])
    split = table_split(made, "the made set")
    with pytest.raises(DataError, match=rf"Row 1 of the made set has label {label}: .*{says}") as error:
        check_labels(open_reader(split).rows([0, 1]), np.array([0, 1]), 10, split.where)
    one_sentence(error)


def test_the_shipped_images_are_balanced_pngs_of_28_by_28() -> None:
    for name, rows, groups in (("train", 4000, 16), ("test", 1000, 4)):
        split = open_split("sample", name)
        assert (split.images, len(split.rows)) == (rows, groups)
        read = open_reader(split).rows(list(range(rows)))
        assert np.bincount([row.labels[0] for row in read]).tolist() == [rows // 10] * 10
        assert Image.open(io.BytesIO(read[0].data)).size == (28, 28)
    sample = Path(open_split("sample", "train").files[0]).parent  # type: ignore[attr-defined]
    assert sum(file.stat().st_size for file in sample.iterdir()) <= 4_000_000
