"""The data benchmark runs, compares what it says it compares, and tells mistakes in a sentence."""

import importlib
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from xception_pl.bench import __main__ as bench
from xception_pl.bench import batches, crops
from xception_pl.bench.batches import first_epochs, our_batches, write_parquet
from xception_pl.bench.crops import dali_ways, image_files, in_turns
from xception_pl.bench.data import lost, main
from xception_pl.bench.first_batch import IMAGES, write_layout
from xception_pl.data.source import open_split
from xception_pl.recipe import load_recipe


def test_images_are_made_from_photographs(tmp_path: Path) -> None:
    files = image_files(None, 5, tmp_path)
    assert [Image.open(path).size for path in files] == [(500, 375)] * 5
    assert len({path.read_bytes() for path in files}) == 5


def test_turns_are_interleaved_and_the_first_is_not_counted() -> None:
    calls: list[tuple[str, int]] = []
    ways = {name: lambda turn, name=name: calls.append((name, turn)) for name in "ab"}
    seconds = in_turns(ways, turns=2)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_the_part_of_one_core(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, path in enumerate(image_files(None, 3, tmp_path)):
        path.rename(tmp_path / f"{number}.JPG")
    out = tmp_path / "out.json"
    options = ["--parts", "crops", "--turns", "1", "--gpu-rate", "1000", "--json", str(out)]
    assert bench.main(["data", str(tmp_path), *options]) == 0
    result = json.loads(out.read_text())
    rates = {row["name"]: row["images_per_second"] for row in result["one_core"]}
    assert result["images"] == 3
    assert {"read only", "read and decode, Pillow", crops.TIMM, crops.OURS} < set(rates)
    assert all(rate > 0 for rate in rates.values())
    assert result["cores_per_gpu"] == pytest.approx(1000 / rates[crops.OURS], abs=0.01)
    goals = {goal["goal"]: goal for goal in result["goals"]}
    assert len(goals) == 3
    dali = goals["at least 1.4 × DALI's CPU pipeline"]
    assert (dali["met"] is None) == (crops.DALI not in rates)
    printed = capsys.readouterr().out
    assert "A GPU that trains 1,000 images/s needs" in printed
    assert "DALI was not measured: No module named 'nvidia.dali'." in printed or crops.DALI in rates


def test_a_dali_that_does_not_decode_is_told_and_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(files: list[Path]) -> None:
        raise RuntimeError("no libnvimgcodec.so\nand more")

    monkeypatch.setattr(crops, "dali_ways", failing)
    ways, missing = crops.ways(image_files(None, 1, tmp_path))
    assert crops.DALI not in ways
    assert "DALI was not measured: no libnvimgcodec.so." in missing


def test_dali_runs_on_a_cpu_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    files = image_files(None, 33, tmp_path)  # a whole batch and another
    for way in dali_ways(files).values():
        way(0)
    assert importlib.import_module("nvidia.dali").__version__


def test_what_workers_lose_is_told_against_both_yardsticks() -> None:
    found = {"one process": 100.0, "2 processes": 190.0, "2 workers, local Parquet": 180.0}
    found |= {"2 workers, loopback hub, first epoch": 90.0, "2 workers, loopback hub, later epochs": 170.0}
    goals: list[dict[str, object]] = []
    lost(found, 2, goals)
    assert [goal["measured"] for goal in goals] == pytest.approx([0.9, 0.45, 0.85, 180 / 190, 90 / 190, 170 / 190])
    assert [goal["met"] for goal in goals] == [True, False, False, True, False, False]


def test_a_recipe_brings_its_source_and_crops(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["recipes/quickstart.yaml", "--images", "3", "--turns", "1", "--parts", "crops", "--json", str(out)]
    assert main(options) == 0
    result = json.loads(out.read_text())
    recipe = load_recipe("recipes/quickstart.yaml").data
    names = [row["name"] for row in result["one_core"]]
    assert f"xception_pl, the recipe's crop ({recipe.train_crop}, {recipe.image_size} px)" in names
    assert result["images"] == 3
    assert result["mean_kilobytes"] < 1  # the shipped 28 × 28 images


def test_our_batches_go_on_from_epoch_to_epoch_and_first_epochs_begin_again(tmp_path: Path) -> None:
    contents = [path.read_bytes() for path in image_files(None, 4, tmp_path)]
    folder = write_parquet(contents * 20, tmp_path / "parquet" / "data")
    for made in (our_batches(str(folder), 0), first_epochs(str(folder), 0, str(tmp_path / "caches"))):
        assert list(itertools.islice(made, 5)) == [32] * 5  # two a pass of 80 images: into the third pass


@pytest.mark.slow
def test_the_part_of_the_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ROWS", 128)
    out = tmp_path / "out.json"
    options = ["--parts", "batches", "--images", "4", "--turns", "1", "--workers", "1", "--gpu-rate", "500"]
    assert main([*options, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["batches"]) == {
        "one process",
        "1 processes",
        "1 workers, local Parquet",
        "timm, 1 workers",
        "1 workers, loopback hub, first epoch",
        "1 workers, loopback hub, later epochs",
    }
    assert all(rate > 0 for rate in result["batches"].values())
    assert len(result["goals"]) == 6
    local = result["batches"]["1 workers, local Parquet"]
    assert result["cores_per_gpu"] == pytest.approx(500 / local, abs=0.01)


def test_the_layout_is_imagenets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout(tmp_path / "imagenet")
    split = open_split(str(tmp_path / "imagenet"), "train")
    assert split.images == IMAGES
    assert len(split.files) == 294  # type: ignore[attr-defined]
    assert len(split.rows) == 294 * 44
    assert split.rows.max() == 100


@pytest.mark.slow
def test_the_part_of_the_starts(tmp_path: Path) -> None:
    """A start inside an epoch waits for its window's row groups, wherever it is, and for none that are kept."""
    out = tmp_path / "out.json"
    assert main(["--parts", "starts", "--images", "1", "--workers", "2", "--json", str(out)]) == 0
    starts = {(start["at"], start["cache"]): start for start in json.loads(out.read_text())["starts"]}
    assert len(starts) == 6
    assert starts[0.0, "empty"]["row_groups"] >= 64
    for place in (0.0, 0.01, 0.9):
        assert starts[place, "kept"]["row_groups"] < starts[place, "empty"]["row_groups"]


def test_a_loader_that_fails_is_told() -> None:
    with batches.Loader(json.loads, "no JSON") as loader:
        loader.ask(1)
        with pytest.raises(RuntimeError, match="a loader of the benchmark failed"):
            loader.answer()


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("data: {sauce: sample}")
    assert main([str(tmp_path / "bad.yaml")]) == 2
    assert "sauce" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "holds no .jpg, .jpeg, .png, .webp file: name a folder of images." in capsys.readouterr().err
    assert main(["--workers", "0"]) == 2
    assert capsys.readouterr().err == "--workers 0 is below 1.\n"
    assert bench.main(["speed"]) == 2
    assert "'speed' is no measurement: choose one of train, infer, fit, predict, data, " in capsys.readouterr().err
    assert bench.main(["--help"]) == 0
    assert "python -m xception_pl.bench WHAT" in capsys.readouterr().out
