"""Which pictures an argument means."""

import io
from pathlib import Path

import pytest

from tests.data.test_hub import VAL, write_set
from tests.data.tracing import png
from tests.loopback_hub import LoopbackHub
from xception_pl.data.errors import DataError
from xception_pl.prediction.pictures import find_pictures


def names(*arguments: str, stdin: str = "", split: str = "test") -> list[str]:
    found = find_pictures(arguments, split=split, stdin=io.StringIO(stdin))
    listed = [picture.name for part in found for picture in part]
    assert len(listed) == sum(map(len, found))
    return listed


def test_folders_are_gone_through_by_path(folder: Path) -> None:
    below = [Path(name).relative_to(folder).as_posix() for name in names(str(folder))]
    assert below == ["a.jpg", "b.JPEG", "c.png", "d.jpg", "e.jpg", "f.png", "sub/g.png"]


def test_a_file_is_taken_whatever_its_name(folder: Path) -> None:
    assert names(str(folder / "notes.txt"), str(folder / "a.jpg")) == [str(folder / "notes.txt"), str(folder / "a.jpg")]


def test_patterns(folder: Path) -> None:
    assert names(f"{folder}/*.jpg") == [str(folder / name) for name in ("a.jpg", "d.jpg", "e.jpg")]
    assert names(f"{folder}/**/*.png") == [str(folder / name) for name in ("c.png", "f.png", "sub/g.png")]
    with pytest.raises(DataError, match=r"No file matches .*\*\.tiff"):
        names(f"{folder}/*.tiff")


def test_a_list_on_standard_input_keeps_its_place() -> None:
    assert names("first.jpg", "-", "last.jpg", stdin="one.png\n\n  two.png \n") == [
        "first.jpg",
        "one.png",
        "two.png",
        "last.jpg",
    ]


def test_a_missing_file_is_left_to_reading() -> None:
    assert names("gone.jpg", "cats/tom.jpg", "some/where/else") == ["gone.jpg", "cats/tom.jpg", "some/where/else"]


def test_rows_of_a_dataset() -> None:
    (rows,) = find_pictures(["sample"], split="test")
    assert len(rows) == 1000
    pictures = list(rows)
    assert pictures[65].name == "split 'test' of sample:65"
    assert pictures[65].read()[:4] == b"\x89PNG"
    assert pictures[64].read() != pictures[65].read()


def test_rows_of_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "hub")
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.attract(monkeypatch, tmp_path / "cache")
        (rows,) = find_pictures([hub.repo], split="validation")
        pictures = list(rows)
        assert [picture.name for picture in pictures] == [f"split 'validation' of {hub.repo}:{i}" for i in range(VAL)]
        assert pictures[VAL - 1].read() == png(VAL - 1)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There are no pictures in"):
        names(str(tmp_path))
    with pytest.raises(DataError, match="no split 'tset' in sample"):
        names("sample", split="tset")
