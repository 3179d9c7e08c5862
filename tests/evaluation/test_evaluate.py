"""The evaluate command against a plain loop by hand, on one process and on two."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from xception_pl import load_network
from xception_pl.data.config import DataConfig
from xception_pl.data.decode import eval_image
from xception_pl.evaluate import main
from xception_pl.module import XceptionModule
from xception_pl.weights.safetensors import save_weights

IMAGES, BATCH, CORRUPT = 45, 8, 11
MODEL = {"num_classes": 10, "width": 0.125, "middle_blocks": 0}


def write_weights(
    path: Path, seed: int, names: list[str] | None = None, *, loss: str = "cross_entropy", **preprocessing: Any
) -> Path:
    torch.manual_seed(seed)
    module = XceptionModule(
        MODEL | {"num_classes": len(names) if names else 10},
        {"ema_decay": 0, "loss": loss},
        class_names=names,
        preprocessing={"image_size": 71, "eval_crop": "resize"} | preprocessing,
    )
    for parameter in module.network.fc.parameters():  # type: ignore[union-attr]
        torch.nn.init.normal_(parameter)
    save_weights(module, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of weights, and 45 of the shipped images, one of them junk."""
    here = tmp_path_factory.mktemp("evaluate")
    table = pq.read_table("xception_pl/data/sample/test.parquet").slice(0, IMAGES)
    rows = table.to_pylist()
    rows[CORRUPT]["image"]["bytes"] = b"junk"
    (here / "data").mkdir()
    pq.write_table(table.from_pylist(rows, schema=table.schema), here / "data" / "test.parquet", row_group_size=10)
    write_weights(here / "a.safetensors", 0)
    write_weights(here / "b.safetensors", 1)
    return here


def by_hand(folder: Path, weights: str, left_out: tuple[int, ...] = ()) -> dict[str, Any]:
    """Batches of eight in order, the last filled up; sums of float64 in the order of the images."""
    network = load_network(folder / weights)
    rows = pq.read_table(folder / "data" / "test.parquet").to_pylist()
    config = DataConfig(image_size=71, eval_crop="resize")
    losses, top1, top5, seen = [], 0, 0, 0
    for first in range(0, IMAGES, BATCH):
        ids = [min(first + i, IMAGES - 1) for i in range(BATCH)]
        images = torch.zeros(BATCH, 3, 71, 71)
        for place, i in enumerate(ids):
            if i != CORRUPT:
                images[place] = torch.from_numpy(eval_image(rows[i]["image"]["bytes"], config)).permute(2, 0, 1)
            else:
                images[place] = 0
        with torch.no_grad():
            logits = network((images / 127.5 - 1).contiguous(memory_format=torch.channels_last)).double()
        for place in range(min(BATCH, IMAGES - first)):
            if ids[place] in (CORRUPT, *left_out):
                continue
            label = rows[ids[place]]["label"]
            losses.append(float(F.cross_entropy(logits[place], torch.tensor(label))))
            ranked = logits[place].argsort(descending=True).tolist()
            top1 += ranked[0] == label
            top5 += label in ranked[:5]
            seen += 1
    return {"images": seen, "top1": top1 / seen, "top5": top5 / seen, "loss": math.fsum(losses) / seen}


def command(folder: Path, *more: str, weights: str = "a.safetensors") -> list[str]:
    return [
        str(folder / weights), "--data", str(folder / "data"), "--split", "test", "--batch", str(BATCH), *more,
    ]  # fmt: skip


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json", "--data.workers=0"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def numbers(network: dict[str, Any]) -> dict[str, Any]:
    return {name: network[name] for name in ("images", "top1", "top5", "loss")}


def test_it_is_the_plain_loop_to_the_last_digit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = found(capsys, *command(folder))
    assert numbers(result["networks"][0]) == by_hand(folder, "a.safetensors")
    assert result["images"] == IMAGES
    assert result["corrupt"] == [
        {"row": CORRUPT, "reason": "4 bytes cannot be read: they are no image of a known format"}
    ]
    assert result["networks"][0]["preprocessing"].startswith("resize: RGB, the whole image resized to 71 × 71")


def test_several_networks_share_a_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = found(capsys, *command(folder, "--compare", str(folder / "b.safetensors")))
    assert [numbers(network) for network in result["networks"]] == [
        by_hand(folder, "a.safetensors"),
        by_hand(folder, "b.safetensors"),
    ]
    (pair,) = result["comparisons"]
    top1 = [network["top1"] for network in result["networks"]]
    assert pair["difference"] == pytest.approx(top1[1] - top1[0])
    assert (pair["only_second"] - pair["only_first"]) / 44 == pytest.approx(pair["difference"])


def test_excluded_images_do_not_count(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "list").write_text("0\n3\n44\n")
    result = found(capsys, *command(folder, "--exclude", str(tmp_path / "list")))
    assert numbers(result["networks"][0]) == by_hand(folder, "a.safetensors", left_out=(0, 3, 44))
    assert result["excluded"] == 3


def test_preprocessing_may_be_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = found(capsys, *command(folder))
    other = found(capsys, *command(folder, "--preprocessing", "timm", "--image-size", "75"))
    assert other["networks"][0]["preprocessing"].startswith("timm: RGB, the shorter side resized to 83 pixels")
    assert own["networks"][0]["loss"] != other["networks"][0]["loss"]


def test_a_recipe_gives_its_data(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"data: {{source: {folder}/data, val_split: test, eval_batch: {BATCH}}}\n")
    result = found(capsys, str(folder / "a.safetensors"), "--data", str(tmp_path / "recipe.yaml"))
    assert numbers(result["networks"][0]) == by_hand(folder, "a.safetensors")


def test_classes_are_matched_by_name(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Weights whose classes stand in another order, and with one more, are the same weights."""
    network = load_network(folder / "a.safetensors")
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    module = XceptionModule(
        MODEL | {"num_classes": 11},
        {"ema_decay": 0},
        class_names=[*(names[i] for i in order), "Hat"],
        preprocessing={"image_size": 71, "eval_crop": "resize"},
    )
    state = network.state_dict()
    state["fc.weight"] = torch.cat([state["fc.weight"][order], torch.zeros(1, state["fc.weight"].shape[1])])
    state["fc.bias"] = torch.cat([state["fc.bias"][order], torch.tensor([-1e4])])
    module.network.load_state_dict(state)
    save_weights(module, tmp_path / "other.safetensors")
    one = found(capsys, *command(folder))["networks"][0]
    other = found(capsys, *command(tmp_path, weights="other.safetensors")[:1], *command(folder)[1:])["networks"][0]
    assert (other["top1"], other["top5"]) == (one["top1"], one["top5"])
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert "matched to the network's classes by name" in other["note"]


def test_networks_trained_with_sigmoid_have_its_probabilities_and_loss(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_weights(tmp_path / "a.safetensors", 0, loss="sigmoid")
    softmax = found(capsys, *command(folder))["networks"][0]
    sigmoid = found(capsys, str(tmp_path / "a.safetensors"), *command(folder)[1:])["networks"][0]
    network = load_network(folder / "a.safetensors")
    table = pq.read_table(folder / "data" / "test.parquet").to_pylist()
    rows = [row for i, row in enumerate(table) if i != CORRUPT]
    with torch.no_grad():
        config = DataConfig(image_size=71, eval_crop="resize")
        pixels = [torch.from_numpy(eval_image(row["image"]["bytes"], config)).permute(2, 0, 1) for row in rows]
        logits = network(torch.stack(pixels) / 127.5 - 1).double()
    hot = F.one_hot(torch.tensor([row["label"] for row in rows]), 10).double()
    loss = F.binary_cross_entropy_with_logits(logits, hot, reduction="none").sum(1).mean()
    assert (sigmoid["top1"], sigmoid["top5"]) == (softmax["top1"], softmax["top5"])
    assert sigmoid["loss"] == pytest.approx(loss.item(), rel=1e-5)
    confidence = sum(bin["images"] * bin["confidence"] for bin in sigmoid["reliability"] if bin["images"]) / len(rows)
    assert confidence == pytest.approx(logits.amax(1).sigmoid().mean().item(), rel=1e-5)
    assert sigmoid["note"].startswith("trained with sigmoid")
    assert softmax["note"] is None


def test_label_lists_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors", 0, loss="sigmoid")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "a.safetensors"), "--data", "sample-outfits", "--split", "test"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has label lists, and evaluate measures one label an image" in line


def test_what_is_written_and_printed(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capsys.readouterr()
    assert main([*command(folder, "--output", str(tmp_path / "out")), "--data.workers=0"]) == 0
    printed = capsys.readouterr().out
    expected = by_hand(folder, "a.safetensors")
    assert f"top-1       {expected['top1']:.4%}" in printed
    assert f"loss        {expected['loss']:.6f}" in printed
    assert "1 cannot be decoded and do not count" in printed
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["networks"][0]["loss"] == expected["loss"]
    assert "data:image/jpeg" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--preprocesing", "timm"], "unknown option --preprocesing"),
        (["--data.imagecolumn=x"], "--data: unknown key data.imagecolumn. Did you mean data.image_column?"),
        (["--split", "tset"], "There is no split 'tset'"),
        (["--devices", "0"], "--devices 0 is below 1"),
        (["--exclude", "gone"], "--exclude gone cannot be read"),
        (["--compare", "gone.ckpt"], "there is no file gone.ckpt"),
        (["--image-size", "30"], "--image-size 30 is below 71"),
    ],
)
def test_mistakes_are_sentences(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: list[str], sentence: str
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command(folder, *changes))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.splitlines()) == 1


def test_other_numbers_of_classes_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_weights(tmp_path / "three.safetensors", 0, names=["x", "y", "z"])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "three.safetensors"), *command(folder)[1:]])
    assert "There are 10 classes in split 'test'" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from xception_pl.evaluate import parse\ntry: parse(['--help'])\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_give_the_same_digits(folder: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    one = found(capsys, *command(folder, "--compare", str(folder / "b.safetensors")))
    arguments = command(
        folder, "--compare", str(folder / "b.safetensors"), "--json", "--devices", "2", "--accelerator", "cpu",
        f"--data.workers={workers}",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "xception_pl.evaluate", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    for name in ("networks", "corrupt", "comparisons", "images"):
        assert one[name] == two[name]
    assert two["hardware"].startswith("2 × CPU")


@pytest.mark.slow
def test_a_fault_on_one_of_two_processes_ends_both(folder: Path, tmp_path: Path) -> None:
    """A label beyond the classes, in the second process' half, in the first of two passes; said once."""
    table = pq.read_table(folder / "data" / "test.parquet")
    rows = table.to_pylist()
    rows[-1]["label"] = 10
    (tmp_path / "data").mkdir()
    pq.write_table(table.from_pylist(rows, schema=table.schema), tmp_path / "data" / "test.parquet")
    larger = write_weights(tmp_path / "larger.safetensors", 2, image_size=75)
    arguments = [str(folder / "a.safetensors"), *command(tmp_path, "--compare", str(larger))[1:], "--data.workers=0"]
    done = subprocess.run(
        [sys.executable, "-m", "xception_pl.evaluate", *arguments, "--devices", "2", "--accelerator", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1, done.stderr
    assert "label 10" in said[0]
    assert "Traceback" not in done.stderr
