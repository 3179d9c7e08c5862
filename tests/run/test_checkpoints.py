"""When checkpoints are written, and what happens where they cannot be."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from tests.run.test_resume import SignalAt
from xception_pl import durable
from xception_pl.commands import Arguments
from xception_pl.durable import CannotWrite
from xception_pl.recipe import load_recipe
from xception_pl.run import checkpoints as module
from xception_pl.run.folder import read_starts
from xception_pl.run.interrupt import SignalFlag
from xception_pl.training import prepare, train

TINY = """
model: {num_classes: 10, width: 0.05, middle_blocks: 1}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, workers: 0, shuffle_window: 512}
optim: {lr: 0.02}
trainer: {max_epochs: 1, limit_train_batches: 6, limit_val_batches: 1, log_every_n_steps: 3, enable_progress_bar: false}
run: {tensorboard: false}
"""


class Look(Callback):
    """Notes the step of `last.ckpt` before each batch, as far as it is there; calls `at` with the batch's step."""

    def __init__(self, folder: Path, at: Any = lambda step: None) -> None:
        self.path, self.at = folder / "checkpoints" / "last.ckpt", at
        self.saved: list[int | None] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.at(trainer.global_step + 1)
        self.saved.append(torch.load(self.path, weights_only=True)["global_step"] if self.path.exists() else None)


class Disk:
    """A disk that is full in some steps: writing a checkpoint fails as the system would say it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *full: int) -> None:
        self.full, self.step = full, 0
        original = durable._File.write

        def write(file: Any, data: Any) -> int:
            if self.step in self.full and Path(str(file.name)).name.startswith("last.ckpt"):
                file.failure = OSError(28, "No space left on device")
                raise file.failure
            return original(file, data)

        monkeypatch.setattr(durable._File, "write", write)

    def at(self, step: int) -> None:
        self.step = step


def run(folder: Path, *more: Callback, signals: SignalFlag | None = None, **overrides: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(TINY)
    changes = {name.replace("__", "."): value for name, value in overrides.items()}
    prepared = prepare(load_recipe(folder / "tiny.yaml", changes), resume="auto", into=str(folder / "run"))
    command = Arguments(str(folder / "tiny.yaml"))
    return train(prepared, signals or SignalFlag(), command=command, callbacks=list(more))


def test_saves_come_by_steps_and_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look(tmp_path / "steps" / "run")
    assert run(tmp_path / "steps", look, run__save_every_steps="2") == 0
    assert look.saved == [None, None, 2, 2, 4, 4]  # the sixth is saved at the epoch's end

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def tick(step: int) -> None:
        now[0] += 40.0

    look = Look(tmp_path / "minutes" / "run", tick)
    assert run(tmp_path / "minutes", look, run__save_every_minutes="1.5") == 0
    assert look.saved == [None, None, None, 3, 3, 3]  # after 120 s


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(monkeypatch, 3, 4)
    look = Look(tmp_path / "run", disk.at)
    assert run(tmp_path, look, run__save_every_steps="1") == 0
    assert look.saved == [None, 1, 2, 2, 2, 5]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert warnings == [
        f"warning: step {step} is not saved: {last} cannot be written: No space left on device; what was there before is "
        f"untouched. Training goes on, and saving is tried again after 5 minutes. The last good checkpoint is {last}."
        for step in (3, 4)
    ]


def test_a_disk_that_stays_full_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_GIVE_UP_SECONDS", 0.0)
    disk = Disk(monkeypatch, *range(3, 100))
    assert run(tmp_path, Look(tmp_path / "run", disk.at), run__save_every_steps="1") == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: No checkpoint could be written for 0 minutes. The last good checkpoint is ")
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_a_signal_with_a_full_disk_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler must not take lost steps for saved ones."""
    disk, signals = Disk(monkeypatch, 4), SignalFlag()
    watching = [Look(tmp_path / "run", disk.at), SignalAt(signals, ("step", 4))]
    assert run(tmp_path, *watching, signals=signals, run__save_every_steps="3") == 1
    printed = capsys.readouterr().out
    assert "error: SIGTERM: stopped after step 4, which is lost: " in printed
    assert "No space left on device" in printed
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


def test_the_end_of_a_run_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise CannotWrite(tmp_path / "results.json", "No space left on device")

    monkeypatch.setattr("xception_pl.training.write_results", full)
    assert run(tmp_path) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run/results.json").exists()


def test_each_start_is_noted_with_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that decide the numbers are told from those that do not; the network's computation may change."""
    signals = SignalFlag()
    assert run(tmp_path, SignalAt(signals, ("step", 3)), signals=signals) == 143
    capsys.readouterr()
    changes = {"optim__lr": "0.01", "run__save_every_steps": "5", "model__grad_checkpointing": "true"}
    assert run(tmp_path, **changes) == 0
    plan = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    after = "; may change, and from here on this is another recipe's run"
    assert plan == [
        f"changed   model.grad_checkpointing was False and is True{after}",
        f"changed   optim.lr was 0.02 and is 0.01{after}",
        "changed   run.save_every_steps was 0 and is 5",
    ]
    first, second = read_starts(tmp_path / "run")
    assert (first["step"], first["checkpoint"], first["changed"]) == (0, None, {})
    assert (second["step"], second["checkpoint"]) == (3, str(tmp_path / "run/checkpoints/last.ckpt"))
    assert second["changed"]["optim.lr"] == "was 0.02 and is 0.01"
    assert json.loads((tmp_path / "run/results.json").read_text())["steps"] == 6


def test_a_signal_is_answered_with_its_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signals = SignalFlag()

    def send(step: int) -> None:
        if step == 2:
            signals.received, signals.at = "SIGTERM", time.monotonic() - 100.0

    assert run(tmp_path, Look(tmp_path / "run", send), signals=signals) == 143
    printed = capsys.readouterr().out
    assert "SIGTERM: stopped after step 2 and saved " in printed
    assert 100 <= float(printed.split("last.ckpt, ")[1].split(" s after the signal")[0]) < 200
