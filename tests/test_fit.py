"""The fit command, whole: what it prints, what it writes, how it stops and goes on."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from xception_pl import Xception, XceptionModule, load_network
from xception_pl.fit import main
from xception_pl.run.log import RunLog

TINY = """
model: {num_classes: 10, width: 0.125, middle_blocks: 1, bn_momentum: 0.1, dropout: 0.5}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, workers: 0, shuffle_window: 512}
optim: {lr: 0.02, ema_decay: 0.9, decay_every_epochs: 0.0025}
trainer: {max_epochs: 2, limit_train_batches: 6, limit_val_batches: 2, log_every_n_steps: 4, enable_progress_bar: false}
"""
CLOCK = ("images_per_second", "data_wait")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test runs in a folder of its own, with the signal handlers it found."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in this process; `signals_at` sends Ctrl-C at the end of those optimiser steps."""

    def call(*argv: str, signals_at: tuple[int, ...] = ()) -> int:
        original = RunLog.on_train_batch_end

        def patched(self: RunLog, trainer: Any, *args: Any) -> None:
            original(self, trainer, *args)
            if trainer.global_step in signals_at:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "on_train_batch_end", patched)
            return main(list(argv))

    return call


def only_run(name: str = "tiny") -> Path:
    (folder,) = Path("runs", name).iterdir()
    return folder


def logged(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def state(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


def test_a_run_writes_its_folder_and_its_table(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tiny.yaml", "--seed=3") == 0
    folder = only_run()
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "recipe.yaml",
        "environment.json",
        "metrics.csv",
        "results.json",
        "curves.png",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "checkpoints/averaged.safetensors",
    } <= written
    assert any("tfevents" in name for name in written)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["seed"] == 3
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.")
    printed = capsys.readouterr().out
    for line in (
        "batch     8 = 1 devices × 8 × 1 accumulated",
        "averaged weights, 128 held-out images",  # what limit_val_batches lets through, not the split's 1,000
        "top-1",
        "top-5",
        f"written to {folder}/",
    ):
        assert line in printed
    results = json.loads((folder / "results.json").read_text())
    assert (results["steps"], results["parameters"]) == (12, 158_058)
    assert 0 <= results["val_top1"] <= results["val_top5"] <= 1
    for weights in ("averaged.safetensors", "last.ckpt"):  # the numbers travel with the weights that were measured
        found = load_network(folder / "checkpoints" / weights).results
        assert found == {name[4:]: value for name, value in results.items() if name.startswith("val_")} | {
            "data": "split 'test' of sample"
        }
        assert found["images"] == 128
    assert load_network(folder / "checkpoints" / "last.ckpt", raw=True).results is None
    rows = logged(folder)
    assert [int(row["step"]) for row in rows] == [4, 6, 6, 8, 12, 12]  # windows, epochs' ends, validations
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_loads_and_predicts(run: Any) -> None:
    assert run("tiny.yaml") == 0
    folder = only_run()
    module = XceptionModule.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    images = torch.randint(0, 256, (3, 3, 80, 71), dtype=torch.uint8)
    probabilities = module.predict(images)
    assert probabilities.shape == (3, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    torch.testing.assert_close(probabilities, module.predict(images.float() / 127.5 - 1))
    assert module.class_names is not None
    assert module.class_names[0] == "T-shirt/top"

    file = folder / "checkpoints" / "averaged.safetensors"
    network = Xception(10, width=0.125, middle_blocks=1)
    network.load_state_dict(load_file(file))
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images.float() / 127.5 - 1).softmax(1), probabilities)
    with safe_open(file, "pt") as opened:
        described = {name: json.loads(text) for name, text in opened.metadata().items() if name != "format"}
    assert described["class_names"] == module.class_names
    assert described["preprocessing"]["image_size"] == 71


def test_a_dry_run_writes_nothing(run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("tiny.yaml", "--dry-run") == 0
    assert "steps     6 an epoch" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_the_paper_is_planned_without_network_token_or_gpu(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("recipes/imagenet.yaml", "--dry-run") == 0
    printed = capsys.readouterr().out
    for line in (
        "22,855,952 parameters",
        "1,281,167 training and 50,000 held-out images",
        "256 = 1 devices × 32 × 8 accumulated",
        "5,004 an epoch (143 images left out), 500,400 in 100 epochs",
        "0.045 at the start, 0.0101925 in the middle, 0.00217009 at the end",
        "unchecked trainer.devices 1 on trainer.accelerator gpu",
        "unchecked",
    ):
        assert line in printed


@pytest.mark.parametrize(
    "more", [(), ("--data.workers=2", "--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=12")]
)
def test_resuming_equals_not_stopping(run: Any, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    """Stopped in the first epoch and again in the second: the same losses and, to the bit, the same weights."""
    assert run("tiny.yaml", "--run.name=whole", *more) == 0
    assert run("tiny.yaml", "--run.name=parts", *more, signals_at=(3,)) == 130
    first = capsys.readouterr().out
    resume = shlex.split(next(line for line in first.splitlines() if line.startswith("resume with: ")))
    assert resume[2:6] == ["python", "-m", "xception_pl.fit", "tiny.yaml"]
    assert (only_run("parts") / "curves.png").exists() is (only_run("parts") / "metrics.csv").exists()
    assert run(*resume[5:], signals_at=(9,)) == 130
    assert run("tiny.yaml", "--run.name=parts", *more, "--resume", "last") == 0

    whole, parts = only_run("whole"), only_run("parts")
    assert logged(whole) == logged(parts)
    one, other = state(whole), state(parts)
    assert one["global_step"] == other["global_step"] == 12
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    assert one["optimizer_states"][0]["param_groups"] == other["optimizer_states"][0]["param_groups"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_every_process_saves_and_stops(number: signal.Signals, code: int) -> None:
    """As a terminal and a scheduler send it: to the trainer and to its loader workers."""
    more = ["--data.workers=2", "--trainer.max_epochs=1000", "--trainer.enable_progress_bar=true"]
    command = [sys.executable, "-m", "xception_pl.fit", "tiny.yaml", *more]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 6/6000  val_"):
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert f"{number.name}: stopped after step " in printed
    assert "Traceback" not in errors
    assert (only_run() / "checkpoints" / "last.ckpt").exists()
    assert (only_run() / "curves.png").exists()


@pytest.mark.slow
def test_a_signal_during_the_imports_is_not_lost() -> None:
    command = [sys.executable, "-m", "xception_pl.fit", "tiny.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)  # the handler is there, and nothing else yet
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "SIGTERM: stopped before the first step; there is nothing to save." in printed
    assert "Traceback" not in errors


def test_auto_starts_a_run_and_goes_on_with_it_by_the_same_command(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a job does that a scheduler starts again and again."""
    again = ("tiny.yaml", "--into", "runs/tiny/job", "--resume=auto")
    assert run(*again, signals_at=(3,)) == 130
    assert run(*again, signals_at=(8,)) == 130
    assert run(*again) == 0
    assert only_run() == Path("runs/tiny/job")
    assert state(only_run())["global_step"] == 12
    with pytest.raises(SystemExit):
        run("tiny.yaml", "--into=runs/tiny/job")
    assert "holds a run already; add --resume auto" in capsys.readouterr().err


def test_auto_without_a_folder_goes_on_with_the_newest_unfinished_run(run: Any) -> None:
    assert run("tiny.yaml", "--resume=auto", signals_at=(3,)) == 130
    first = only_run()
    assert run("tiny.yaml", "--resume=auto") == 0
    assert only_run() == first
    assert run("tiny.yaml", "--resume=auto", signals_at=(1,)) == 130
    assert len(list(Path("runs/tiny").iterdir())) == 2


def test_resuming_with_another_network_is_refused(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tiny.yaml", signals_at=(2,)) == 130
    with pytest.raises(SystemExit) as ended:
        run("tiny.yaml", "--resume=last", "--model.width=0.25", "--optim.lr=0.1")
    assert ended.value.code == 2
    assert "model.width was 0.125 and is 0.25" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run("tiny.yaml", "--resume=tiny.yaml")
    assert ended.value.code == 2
    assert "tiny.yaml is not a checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run("tiny.yaml", "--resume=last", "--run.name=unheard")
    assert ended.value.code == 2


def test_changed_optimiser_settings_act_on_resuming(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """From the next step on: stored settings and rates must not outlive the recipe's."""
    assert run("tiny.yaml", signals_at=(2,)) == 130
    assert run("tiny.yaml", "--resume=last", "--optim.l2=0.001", "--optim.momentum=0.5", "--optim.lr=0.004") == 0
    assert "changed   optim.l2 was 1e-05 and is 0.001" in capsys.readouterr().out
    groups = {group["name"]: group for group in state(only_run())["optimizer_states"][0]["param_groups"]}
    assert (groups["l2"]["weight_decay"], groups["no_l2"]["weight_decay"]) == (0.001, 0)
    assert {group["momentum"] for group in groups.values()} == {0.5}
    rates = [float(row["lr"]) for row in logged(only_run()) if row["lr"]]
    assert rates == [0.004 * 0.94**3, 0.004 * 0.94**5, 0.004 * 0.94**7, 0.004 * 0.94**11]


def test_another_decay_of_the_average_may_resume(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A small one is not none."""
    assert run("tiny.yaml", signals_at=(2,)) == 130
    assert run("tiny.yaml", "--resume=last", "--optim.ema_decay=0.05") == 0
    assert "changed   optim.ema_decay was 0.9 and is 0.05" in capsys.readouterr().out


def test_a_finished_run_that_goes_on_is_unfinished_again(run: Any) -> None:
    assert run("tiny.yaml", "--trainer.max_epochs=1") == 0
    assert (only_run() / "results.json").exists()
    assert run("tiny.yaml", "--resume=last", signals_at=(8,)) == 130
    assert not (only_run() / "results.json").exists()


@pytest.mark.parametrize("change", ["ema_decay=0", "name=rmsprop", "l2_on=all"])
def test_another_optimiser_cannot_resume(run: Any, capsys: pytest.CaptureFixture[str], change: str) -> None:
    assert run("tiny.yaml", signals_at=(2,)) == 130
    with pytest.raises(SystemExit):
        run("tiny.yaml", "--resume=last", f"--optim.{change}")
    assert f"optim.{change.split('=')[0]} was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--data.source=./nowhere", "./nowhere"),
        ("--data.label_column=lable", "lable"),
        ("--data.val_split=valid", "valid"),
        ("--data.train_images=7", "data.train_images"),
        ("--model.num_classes=3", "10 classes"),
        ("--data.global_batch=5000", "5000"),
        ("--model.name=xcepton", "xception"),
        ("--model.segments=7", "segments"),
        ("--optim.decay_every_epochs=0.001", "optim.decay_every_epochs"),
        (
            "--data.image_size=72 --model.name=vit_tiny_patch16_224 --model.width=1 --model.middle_blocks=8",
            "image_size 72",
        ),
        ("--trainer.accelerator=gpu", "GPU"),
        ("--trainer.precision=16-mixed", "trainer.precision 16-mixed needs a GPU"),
    ],
)
def test_what_the_machine_or_the_source_refuses(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, expected: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("tiny.yaml", *override.split())
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert expected in errors
    assert errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    "override", ["--trainer.precision=bf16-mixed", "--trainer.precision=64-true", "--model.channels_last=false"]
)
def test_other_arithmetic_trains(run: Any, override: str) -> None:
    assert run("tiny.yaml", override, "--trainer.max_epochs=1", "--trainer.deterministic=true") == 0
    losses = [float(row["train_loss"]) for row in logged(only_run()) if row["train_loss"]]
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.slow
def test_a_compiled_network_trains_and_loads(run: Any) -> None:
    assert run("tiny.yaml", "--model.compile=true", "--model.middle_blocks=0", "--trainer.max_epochs=1") == 0
    module = XceptionModule.load_from_checkpoint(only_run() / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any("_orig_mod" in name for name in module.state_dict())


def test_the_last_weights_are_evaluated_where_no_epoch_ends_with_them(run: Any) -> None:
    assert run("tiny.yaml", "--trainer.max_steps=8") == 0
    last = logged(only_run())[-1]
    assert (int(last["step"]), bool(last["val_top1"])) == (8, True)
