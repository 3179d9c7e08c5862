"""A run that is stopped anywhere and goes on ends as if it had not been: to the bit, on a CPU."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from xception_pl.commands import Arguments
from xception_pl.recipe import load_recipe
from xception_pl.run.interrupt import SignalFlag
from xception_pl.run.trace import Trace, read_trace, same_state
from xception_pl.training import prepare, train

TINY = """
model: {num_classes: 10, width: 0.05, middle_blocks: 1, bn_momentum: 0.1, dropout: 0.5}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, workers: 0, shuffle_window: 512}
optim: {lr: 0.02, ema_decay: 0.9, decay_every_epochs: 0.0025}
trainer: {max_epochs: 2, limit_train_batches: 6, limit_val_batches: 2, val_check_interval: 4, log_every_n_steps: 4,
          enable_progress_bar: false}
run: {tensorboard: false}
"""
CLOCK = ("images_per_second", "data_wait")
MOMENTS = [("step", 1), ("step", 3), ("step", 4), ("validation at", 4, 0), ("validation at", 4, 1), ("step", 6)]
MOMENTS += [
    ("step", 7),
    ("step", 10),
    ("validation at", 10, 0),
    ("validation at", 10, 1),
    ("step", 11),
]  # 6 ends an epoch


class SignalAt(Callback):
    """Sets the flag, as a signal's handler would, at a moment, once."""

    def __init__(self, signals: SignalFlag, *moments: tuple[Any, ...], name: str = "SIGTERM") -> None:
        self.signals, self.moments, self.name = signals, moments, name

    def _at(self, *moment: Any) -> None:
        if moment in self.moments:
            self.signals.received = self.name

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at("start", trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._at("step", trainer.global_step + 1)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *index: int) -> None:
        self._at("validation at", trainer.global_step, index[0])


def run(folder: Path, *stops: tuple[Any, ...], overrides: dict[str, str] | None = None) -> int:
    """One start of the run in `folder`, which goes on where there is something to go on from; stopped at a moment."""
    recipe, signals = folder.parent / "tiny.yaml", SignalFlag()
    recipe.write_text(TINY)
    prepared = prepare(load_recipe(recipe, overrides), resume="auto", into=str(folder))
    watching = [Trace(folder), SignalAt(signals, *stops)]
    return train(prepared, signals, command=Arguments(str(recipe)), callbacks=watching)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(folder) == 0
    return folder


def logged(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def checkpoint(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return state


def assert_same_run(one: Path, other: Path) -> None:
    """Images, losses, weights, averages, optimiser, metrics, position."""
    assert read_trace(one) == read_trace(other)
    assert logged(one) == logged(other)
    assert same_state(checkpoint(one), checkpoint(other)) == []


@pytest.mark.parametrize("stop", [("step", 2), ("step", 4), ("step", 6), ("validation at", 4, 0)], ids=str)
def test_stopping_changes_nothing(whole: Path, tmp_path: Path, stop: tuple[Any, ...]) -> None:
    """Inside an epoch, before and in a validation, at an epoch's end."""
    parts = tmp_path / "run"
    assert run(parts, stop) == 143
    assert run(parts) == 0
    assert_same_run(whole, parts)


def test_a_signal_before_the_first_step_is_not_lost(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes during the imports or the rendezvous; nothing is trained, nothing is saved."""
    signals = SignalFlag()
    signals.received = "SIGUSR1"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    prepared = prepare(load_recipe(recipe), resume="auto", into=str(tmp_path / "run"))
    assert train(prepared, signals, command=Arguments(str(recipe))) == 138
    assert "SIGUSR1: stopped before the first step; there is nothing to save." in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert run(tmp_path / "run", ("step", 3)) == 143
    prepared = prepare(load_recipe(recipe), resume="auto", into=str(tmp_path / "run"))
    assert train(prepared, signals, command=Arguments(str(recipe))) == 138
    assert "SIGUSR1: stopped after step 3" in capsys.readouterr().out
    assert run(tmp_path / "run") == 0
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"data.workers": "2"},
        {"trainer.max_steps": "12"},
        {"trainer.precision": "64-true"},
        {
            "trainer.accumulate_grad_batches": "2",
            "trainer.limit_train_batches": "12",
            "trainer.val_check_interval": "8",
        },
    ],
    ids=str,
)
def test_stopping_anywhere_changes_nothing(tmp_path: Path, more: dict[str, str]) -> None:
    """At one moment after the other of the same run: what any stop changed, its end would show."""
    assert run(tmp_path / "whole", overrides=more) == 0
    for stop in MOMENTS:
        assert run(tmp_path / "parts", stop, overrides=more) == 143, stop
    assert run(tmp_path / "parts", overrides=more) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
