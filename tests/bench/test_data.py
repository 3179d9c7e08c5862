"""The data benchmark runs, compares what it says it compares, and tells mistakes in a sentence."""

import json
from pathlib import Path

import pytest
from PIL import Image

from xception_pl.bench import __main__ as bench
from xception_pl.bench.data import image_files, in_turns, main, our_batches, write_parquet
from xception_pl.recipe import load_recipe


def test_images_are_made_from_photographs(tmp_path: Path) -> None:
    files = image_files(None, 5, tmp_path)
    assert [Image.open(path).size for path in files] == [(500, 375)] * 5
    assert len({path.read_bytes() for path in files}) == 5


def test_turns_are_interleaved_and_the_first_is_not_counted(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    ways = {name: lambda path, data, draw, name=name: calls.append((name, draw)) for name in "ab"}
    seconds = in_turns(ways, [tmp_path, tmp_path], [b"", b""], turns=2)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}
    assert calls[:8] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3), ("b", 2), ("b", 3)]


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, path in enumerate(image_files(None, 3, tmp_path)):
        path.rename(tmp_path / f"{number}.JPG")
    out = tmp_path / "out.json"
    options = ["data", str(tmp_path), "--turns", "1", "--workers", "0", "--gpu-rate", "1000", "--json", str(out)]
    assert bench.main(options) == 0
    result = json.loads(out.read_text())
    rates = {row["name"]: row["images_per_second"] for row in result["one_core"]}
    assert result["images"] == 3
    assert {"read only", "read and decode, Pillow", "timm, default training transform"} < set(rates)
    assert all(rate > 0 for rate in rates.values())
    assert result["cores_per_gpu"] == pytest.approx(1000 / rates["xception_pl, inception crop"], abs=0.01)
    assert "A GPU that trains 1,000 images/s needs" in capsys.readouterr().out


def test_a_recipe_brings_its_source_and_crops(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["recipes/quickstart.yaml", "--images", "3", "--turns", "1", "--workers", "0", "--json", str(out)]
    assert main(options) == 0
    result = json.loads(out.read_text())
    recipe = load_recipe("recipes/quickstart.yaml").data
    names = [row["name"] for row in result["one_core"]]
    assert f"xception_pl, the recipe's crop ({recipe.train_crop}, {recipe.image_size} px)" in names
    assert result["images"] == 3
    assert result["mean_kilobytes"] < 1  # the shipped 28 × 28 images


def test_our_batches_come_from_parquet(tmp_path: Path) -> None:
    contents = [path.read_bytes() for path in image_files(None, 4, tmp_path)]
    folder = write_parquet(contents * 20, tmp_path / "parquet")
    batches = our_batches(folder, workers=0)
    assert [next(batches) for _ in range(4)] == [32] * 4  # two a pass of 80 images: into the next pass


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("data: {sauce: sample}")
    assert main([str(tmp_path / "bad.yaml")]) == 2
    assert "sauce" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "holds no .jpg, .jpeg, .png, .webp file: name a folder of images." in capsys.readouterr().err
    assert bench.main(["speed"]) == 2
    assert "'speed' is no measurement: choose one of train, infer, fit, data." in capsys.readouterr().err
    assert bench.main(["--help"]) == 0
    assert "python -m xception_pl.bench WHAT" in capsys.readouterr().out
