"""The whole comparison, small: who is measured, who is out and why, and what is written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from xception_pl.bench import __main__ as bench
from xception_pl.bench import ceiling, compare, timing
from xception_pl.bench.check import Outcome, errors, exact, verdict
from xception_pl.bench.contender import Contender, TorchInference, TorchTraining
from xception_pl.bench.keras_peer import KerasRunner
from xception_pl.bench.memory import held, step_memory
from xception_pl.bench.ours import ours
from xception_pl.bench.peers import OnnxRuntime, OpenVino, peers
from xception_pl.bench.task import Task
from xception_pl.nets.cost import activation_bytes, macs

SMALL = ["--device", "cpu", "--size", "71", "--batch", "2", "--rounds", "3", "--seconds", "1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is not looked at: turns of one step, a small product, a small copy."""
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    monkeypatch.setitem(ceiling.PRODUCT_SIZE, "cpu", 64)
    monkeypatch.setitem(ceiling.COPY_BYTES, "cpu", 2**16)


def run(arguments: str, folder: Path) -> tuple[int, Any]:
    out = folder / "out.json"
    status = bench.main([*arguments.split(), *SMALL, "--json", str(out)])
    return status, json.loads(out.read_text()) if out.exists() else None


@pytest.mark.usefixtures("quick")
def test_training(training: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "chart.png"
    status, result = run(f"train --modes nchw --peers timm:channels_last --chart {chart}", tmp_path)
    assert status == 0
    assert [row["name"] for row in result["rows"]] == ["xception_pl:nchw", "timm:channels_last"]
    mine, theirs = result["rows"]
    assert result["reference"] == "timm:channels_last"
    assert theirs["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    pairs = sorted(b / a for a, b in zip(mine["seconds"], theirs["seconds"], strict=True))
    assert mine["ratio"]["median"] == pytest.approx(pairs[1])
    assert mine["rate"]["median"] == pytest.approx(2 / sorted(mine["seconds"])[1])
    forward = macs(training.network(), (3, 71, 71))
    assert result["operations"] == 2 * (3 * forward - 35**2 * 32 * 27)  # nobody wants the gradient of the images
    assert result["product_limit"] == pytest.approx(result["product_flops"]["median"] / result["operations"])
    assert [limit["way"] for limit in result["limits"]] == ["eager", "compiled", "fused", "ideal"]
    assert mine["error"] < 1e-2
    assert mine["first_seconds"] > 0
    assert chart.stat().st_size > 10_000
    text = capsys.readouterr().out
    assert text.startswith("training steps, 2 images of 71 px, fp32, ")
    assert "Medians of 3 rounds in turns; ratios against timm:channels_last." in text


def test_saved_activations_are_those_of_autograd(training: Task) -> None:
    runner = TorchTraining(training.network(), training, channels_last=False)
    counted = activation_bytes(training.network(), (3, 71, 71))
    assert runner.saved_bytes() / training.batch == pytest.approx(counted, rel=0.02)


@pytest.mark.usefixtures("quick")
def test_wrong_and_failing_contenders_are_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(task: Task) -> TorchInference:
        network = task.network()
        assert isinstance(network.block5.bn1, nn.BatchNorm2d)
        network.block5.bn1.eps = 1e-5
        return TorchInference(network, task, channels_last=False)

    def failing(task: Task) -> TorchInference:
        raise RuntimeError("no compiler\nand a long story")

    others = [
        Contender(name="wrong", way="eager", start=wrong),
        Contender(name="failing", way="eager", start=failing),
        Contender(name="absent", way="eager", start=failing, unfit=lambda task: "needs a unicorn"),
    ]
    monkeypatch.setattr(compare, "peers", lambda: others)
    status, result = run("infer --modes nchw", tmp_path)
    assert status == 0
    assert [row["rate"] is None for row in result["rows"]] == [False, True, True]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("wrong: disqualified: logits is off by ") for line in lines)
    assert "failing: failed: RuntimeError: no compiler." in lines
    assert "absent: needs a unicorn." in lines
    monkeypatch.setattr(compare, "ours", lambda: [replace(others[0], name="xception_pl:nchw")])
    assert run("infer --peers none", tmp_path)[0] == 1  # one of ours is wrong


def test_memory_of_a_step_is_seen() -> None:
    device = torch.device("cpu")
    if held(device) is None:
        pytest.skip("this system does not tell")
    peak = step_memory(lambda: torch.ones(64 * 2**20), device)
    assert peak == pytest.approx(256 * 2**20, rel=0.05)


@pytest.mark.parametrize("what", ["inference", "training"])
def test_kernels_compute_the_same(what: str, request: pytest.FixtureRequest) -> None:
    task, right = request.getfixturevalue(what), request.getfixturevalue(f"exact_{what}")
    contender = next(mode for mode in ours() if mode.name == "xception_pl:kernels")
    reason = contender.unfit(task)
    if reason is not None:
        pytest.skip(reason)
    _, wrong = verdict(errors(contender.start(task).outcome(), right))
    assert wrong is None


# What the command promises of its surroundings

WITHOUT = """
import sys
for name in ("lightning", "torchmetrics", "datasets", "jsonargparse", "docstring_parser", "pyarrow", "matplotlib", "rich",
             "tensorboard", "pandas"):
    sys.modules[name] = None  # an import of it fails
from xception_pl.bench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("what", ["train", "infer"])
def test_torch_and_timm_are_enough(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = [what, *SMALL, "--rounds", "1", "--modes", "nchw", "--peers", "timm:nchw", "--json", str(out)]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(row["problem"] is None for row in json.loads(out.read_text())["rows"])


def test_help_imports_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None\n" + WITHOUT
    for what in ("train", "infer"):
        done = subprocess.run([sys.executable, "-c", code, what, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--precision" in done.stdout


# Peers that are not always installed


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_keras_computes_the_same(
    backend: str, inference: Task, training: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "tensorflow" and find_spec("tensorflow") is None:
        python = os.environ.get("XCEPTION_TENSORFLOW_PYTHON")
        if python is None:
            pytest.skip("name an interpreter with tensorflow-cpu in XCEPTION_TENSORFLOW_PYTHON")
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        lent = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
        monkeypatch.setattr(sys, "path", [*sys.path, lent])  # Keras' process gets it; here it is not imported
    for task in (inference, training):
        runner = KerasRunner(task, backend=backend)
        _, wrong = verdict(errors(runner.outcome(), exact(task)))
        assert wrong is None
        runner.turn(2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runtimes_compute_the_same(name: str, inference: Task, exact_inference: Outcome) -> None:
    contender = next(peer for peer in peers() if peer.name == name)
    reason = contender.unfit(inference)
    if reason is not None:
        pytest.skip(reason)
    runner = contender.start(inference)
    assert isinstance(runner, OnnxRuntime | OpenVino)
    _, wrong = verdict(errors(runner.outcome(), exact_inference))
    assert wrong is None
    runner.turn(1)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_compiled_networks_compute_the_same(tmp_path: Path) -> None:
    status, result = run("train --modes compile --peers none --rounds 1", tmp_path)
    assert status == 0
    assert result["rows"][0]["saved"] < 20e6
