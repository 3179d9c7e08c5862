"""The predict command on real JPEGs, PNGs and junk."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.evaluation.test_evaluate import write_weights
from xception_pl import load_network
from xception_pl.data.config import DataConfig
from xception_pl.data.decode import eval_image
from xception_pl.export import main as export
from xception_pl.kernels.cpu_layers import library
from xception_pl.module import XceptionModule
from xception_pl.predict import main
from xception_pl.weights.safetensors import save_weights

NAMES = ["cat", "dog", "eel, electric"]
GOOD = ["a.jpg", "b.JPEG", "c.png", "sub/g.png"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", 0, NAMES))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([*arguments, "--device", "cpu"])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def of_json(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_in_order_with_what_is_bad_named(
    weights: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, weights, str(folder), "--format", "jsonl", "--top", "2", "--batch", "3")
    assert code == 1
    lines = of_json(out)
    assert [line["image"] for line in lines] == [str(folder / name) for name in GOOD]
    expected = load_network(weights).predict([folder / name for name in GOOD])  # type: ignore[operator]
    for line, probabilities in zip(lines, expected, strict=True):
        top = probabilities.sort(descending=True)
        assert [item["class"] for item in line["predictions"]] == top.indices[:2].tolist()
        assert [item["name"] for item in line["predictions"]] == [NAMES[i] for i in top.indices[:2]]
        assert [item["probability"] for item in line["predictions"]] == pytest.approx(top.values[:2].tolist(), abs=1e-5)
    complaints = err.splitlines()
    assert [Path(line.partition(": ")[0]).name for line in complaints[:3]] == ["d.jpg", "e.jpg", "f.png"]
    assert complaints[3] == "error: 3 of 7 pictures were left out."


def test_good_pictures_alone_are_success(weights: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, weights, str(folder / "a.jpg"), str(folder / "sub"))
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.endswith("%")
    assert first.startswith("…")
    assert "a.jpg" in first
    assert "g.png" in second


def test_formats_say_the_same(weights: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [weights, *(str(folder / name) for name in GOOD), "--features"]
    for ending in ("csv", "jsonl", "parquet"):
        assert run(capsys, *arguments, "--output", str(tmp_path / f"out.{ending}"))[:2] == (0, "")
    lines = of_json((tmp_path / "out.jsonl").read_text())
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    rows = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
    network = load_network(weights)
    for line, row, cells in zip(lines, table, rows, strict=True):
        assert line["image"] == row["image"] == cells["image"]
        assert [item["name"] for item in line["predictions"]] == [row[f"name_{n}"] for n in (1, 2, 3)]
        assert [item["class"] for item in line["predictions"]] == [int(cells[f"class_{n}"]) for n in (1, 2, 3)]
        assert line["features"] == pytest.approx(row["features"])
        assert [float(cells[f"f{i}"]) for i in range(len(row["features"]))] == pytest.approx(row["features"], rel=1e-6)
        assert len(row["features"]) == network.num_features
        logits = network.fc(torch.tensor(row["features"]))
        assert logits.softmax(0).max().item() == pytest.approx(row["probability_1"], abs=1e-5)


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors", "hub folder"])
def test_label_lists_have_a_probability_of_their_own_for_each_class(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = XceptionModule(
        {"num_classes": 3, "width": 0.125, "middle_blocks": 0},
        {"ema_decay": 0, "loss": "sigmoid"},
        class_names=NAMES,
        preprocessing={"image_size": 71, "eval_crop": "resize"},
    )
    torch.nn.init.normal_(module.network.fc.weight, 0, 0.1)  # type: ignore[union-attr, arg-type]
    torch.nn.init.constant_(module.network.fc.bias, 2.0)  # type: ignore[union-attr, arg-type]
    weights = tmp_path / "weights"
    if kind == "checkpoint":
        torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, weights)
    else:
        save_weights(module, weights)
    if kind == "hub folder":
        assert export([str(weights), "--to", "hub-folder", "--output", str(tmp_path / "hub")]) == 0
        weights = tmp_path / "hub"
    code, out, _ = run(capsys, str(weights), str(folder / "a.jpg"), str(folder / "c.png"), "--format", "jsonl")
    assert code == 0
    network = load_network(weights)
    assert network.loss == "sigmoid"
    for line in of_json(out):
        pixels = eval_image(Path(line["image"]).read_bytes(), DataConfig(image_size=71, eval_crop="resize"))
        expected = module.predict(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
        assert expected.sum() > 1.5  # softmax' would be 1
        found = {item["class"]: item["probability"] for item in line["predictions"]}
        assert [found[i] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)
        assert [item["probability"] for item in line["predictions"]] == sorted(found.values(), reverse=True)
        assert network.predict(line["image"])[0] == pytest.approx(expected, abs=1e-5)  # type: ignore[operator]


def test_a_reader_that_has_seen_enough_is_no_error(weights: str, folder: Path) -> None:
    command = [sys.executable, "-m", "xception_pl.predict", weights, str(folder), "--device", "cpu", "--batch", "1"]
    process = subprocess.Popen(
        [*command, "--format", "jsonl"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(120) == 128 + 13
    assert process.stderr is not None
    assert not any(line.startswith(("error", "Traceback")) for line in process.stderr)


def test_a_list_on_standard_input(
    weights: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{folder}/c.png\n{folder}/a.jpg\n"))
    code, out, _ = run(capsys, weights, "-", "--format", "jsonl")
    assert code == 0
    assert [line["image"] for line in of_json(out)] == [f"{folder}/c.png", f"{folder}/a.jpg"]


def test_heat_maps(weights: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plain = run(capsys, weights, str(folder), "--format", "jsonl")
    assert run(capsys, weights, str(folder), "--format", "jsonl", "--gradcam", str(tmp_path / "maps"))[0] == 1
    names = [Path(line["image"]).stem for line in of_json(plain[1])]
    labels = [line["predictions"][0]["name"].replace(", ", "-") for line in of_json(plain[1])]
    numbers = [0, 1, 2, 6]
    written = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert written == [
        f"{n:06}_{name}_{label}.png" for n, name, label in zip(numbers, names, labels, strict=True)
    ]  # the number is the picture's place in the input
    with Image.open(tmp_path / "maps" / written[0]) as image:
        assert image.size == (71, 71)
        assert np.asarray(image).std() > 5


@pytest.mark.parametrize(
    "options",
    [["--kernels", "fused"], ["--kernels", "fused", "--features"], ["--fold-bn"], ["--fold-bn", "--features"]],
)
def test_other_ways_to_compute_give_the_same(
    weights: str, folder: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    if options[:2] == ["--kernels", "fused"] and library()[0] is None:
        pytest.skip(library()[1])
    features = [option for option in options if option == "--features"]
    plain = of_json(run(capsys, weights, str(folder), "--format", "jsonl", "--kernels", "torch", *features)[1])
    other = of_json(run(capsys, weights, str(folder), "--format", "jsonl", *options)[1])
    for one, same in zip(plain, other, strict=True):
        assert [p["class"] for p in one["predictions"]] == [p["class"] for p in same["predictions"]]
        assert [p["probability"] for p in one["predictions"]] == pytest.approx(
            [p["probability"] for p in same["predictions"]], abs=1e-4
        )
        assert one.get("features", []) == pytest.approx(same.get("features", []), abs=1e-3, rel=1e-3)


def test_without_a_compiler_torch_predicts_and_kernels_are_refused(
    weights: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xception_pl.kernels.cpu_layers.library", lambda: (None, "there is no C compiler"))
    assert run(capsys, weights, str(folder / GOOD[0]))[0] == 0
    with pytest.raises(SystemExit, match="2"):
        run(capsys, weights, str(folder / GOOD[0]), "--kernels", "fused")
    said = "error: --kernels fused is not possible here: there is no C compiler; use auto or torch.\n"
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_compiled_is_the_same(weights: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = of_json(run(capsys, weights, str(folder), "--format", "jsonl")[1])
    compiled = of_json(run(capsys, weights, str(folder), "--format", "jsonl", "--compile", "--batch", "3")[1])
    for one, other in zip(plain, compiled, strict=True):
        assert one["predictions"][0]["class"] == other["predictions"][0]["class"]
        assert one["predictions"][0]["probability"] == pytest.approx(other["predictions"][0]["probability"], abs=1e-4)


def test_rows_of_the_shipped_images(capsys: pytest.CaptureFixture[str], weights: str, tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"
    assert run(capsys, weights, "sample", "--top", "1", "--output", str(output), "--batch", "64")[0] == 0
    rows = list(csv.DictReader(output.open(newline="")))
    assert [row["image"] for row in rows] == [f"split 'test' of sample:{i}" for i in range(1000)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gone.jpg", "--features"], "--features are too many numbers for a table"),
        (["gone.jpg", "--output", "x.doc"], "--output x.doc ends in none of .csv"),
        (["gone.jpg", "--format", "parquet"], "--output FILE.parquet"),
        (["gone.jpg", "--top", "0"], "--top 0 is below 1"),
        (["gone.jpg", "--gradcam", "maps", "--fold-bn"], "--gradcam needs the gradients"),
        (["gone.jpg", "--compile", "--kernels", "fused"], "leave out --kernels fused"),
        (["*.nothing"], "No file matches *.nothing"),
        (["gone.jpg", "--device", "tpu9"], "--device tpu9 is not there"),
    ],
)
def test_mistakes_are_sentences(
    capsys: pytest.CaptureFixture[str], weights: str, arguments: list[str], sentence: str
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([weights, *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.splitlines()) == 1


def test_weights_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "gone.safetensors"), "a.jpg"])
    assert "gone.safetensors" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from xception_pl.predict import parse\ntry: parse(['--help'])\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
