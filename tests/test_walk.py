"""The first hour of a new user: the commands of the README, one after the other, each on what the one before left."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prediction.conftest import photograph, shipped


@pytest.mark.slow
def test_from_the_quickstart_to_a_prediction_and_an_onnx_file(tmp_path: Path) -> None:
    def run(command: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"xception_pl.{command}", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("fit", "recipes/quickstart.yaml", "--trainer.max_steps=3", "--trainer.limit_val_batches=1")
    (weights,) = tmp_path.glob("runs/quickstart/*")

    printed = run("evaluate", str(weights), "--data", "recipes/quickstart.yaml", "--output", "evaluation", "--json")
    found = json.loads(printed)["networks"][0]
    assert found["images"] == 1000
    assert (tmp_path / "evaluation" / "report.html").stat().st_size > 50_000

    (tmp_path / "pictures").mkdir()
    photograph(0).save(tmp_path / "pictures" / "a.jpg")
    (tmp_path / "pictures" / "b.png").write_bytes(shipped(0))
    run("predict", str(weights), "pictures", "--output", "found.csv", "--gradcam", "maps")
    rows = list(csv.DictReader((tmp_path / "found.csv").open(newline="")))
    assert [row["image"] for row in rows] == ["pictures/a.jpg", "pictures/b.png"]
    assert len(list((tmp_path / "maps").iterdir())) == 2

    run("export", str(weights), "--to", "onnx", "--output", str(tmp_path / "network.onnx"))
    assert (tmp_path / "network.onnx").stat().st_size > 1_000_000
    report = str(tmp_path / "evaluation" / "evaluation.json")
    run("export", str(weights), "--to", "hub-folder", "--output", str(tmp_path / "hub"), "--results", report)
    assert f"| top-1 | {found['top1']:.2%} (95 % interval" in (tmp_path / "hub" / "README.md").read_text()
