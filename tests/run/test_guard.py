"""Losses and gradients that are not finite: stopped at, or left out as if the step had not been."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from tests.processes import on_ranks, printed
from xception_pl.commands import Arguments
from xception_pl.module import XceptionModule
from xception_pl.recipe import load_recipe
from xception_pl.run.guard import StepGuard
from xception_pl.run.interrupt import SignalFlag
from xception_pl.run.launcher import find_launcher
from xception_pl.run.ranks import Ranks
from xception_pl.run.trace import same_state
from xception_pl.training import prepare, train

TINY = """
model: {num_classes: 10, width: 0.05, middle_blocks: 1, bn_momentum: 0.1}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, workers: 0, shuffle_window: 512}
optim: {lr: 0.02, ema_decay: 0.9}
trainer: {max_epochs: 1, limit_train_batches: 6, limit_val_batches: 1, log_every_n_steps: 3, enable_progress_bar: false}
run: {tensorboard: false, save_every_steps: 1}
"""


class Poison(Callback):
    """Puts a value into an image of these steps' batches; keeps their rows and the state before and after each step."""

    def __init__(self, *steps: int, value: float = float("nan")) -> None:
        self.steps, self.value = steps, value
        self.rows: list[int] = []
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        if trainer.global_step + 1 in self.steps:
            batch["image"][3] = self.value
            self.rows += batch["id"].tolist()


def run(folder: Path, poison: Poison, *more: Callback, ranks: Ranks | None = None, **overrides: str) -> int:
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    changes = {name.replace("__", "."): value for name, value in overrides.items()}
    prepared = prepare(load_recipe(recipe, changes), resume="auto", into=str(folder / "run"), ranks=ranks)
    return train(prepared, SignalFlag(), command=Arguments(str(recipe)), ranks=ranks, callbacks=[poison, *more])


def test_the_run_stops_at_the_step_and_names_images_and_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = Poison(4)
    assert run(tmp_path, poison) == 1
    rows = ", ".join(map(str, poison.rows))
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: The loss of step 4 is not finite; its images are the training rows {rows}. "
        f"The last good checkpoint is {tmp_path}/run/checkpoints/last.ckpt."
    )
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert same_state(saved["state_dict"], poison.states[3]) == []  # weights, statistics and averages before step 4
    assert run(tmp_path, Poison()) == 0


def test_steps_are_left_out_as_if_they_had_not_been(tmp_path: Path) -> None:
    poison = Poison(2, 5)
    assert run(tmp_path, poison, trainer__skip_nonfinite_steps="2") == 0
    changed = [bool(same_state(*pair)) for pair in zip(poison.states, poison.states[1:], strict=False)]
    assert changed == [True, False, True, True, False]
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["skipped_steps"]]
    assert [(row["step"], row["skipped_steps"]) for row in rows] == [("3", "1"), ("6", "2")]
    assert all(0 < float(row["train_loss"]) < 10 for row in rows)


def test_the_count_survives_resuming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One skipped, then stopped by another error, then a second one too many."""

    class Fail(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 3:
                raise KeyError("of the test")

    with pytest.raises(KeyError):
        run(tmp_path, Poison(2), Fail(), trainer__skip_nonfinite_steps="1")
    assert run(tmp_path, Poison(5), trainer__skip_nonfinite_steps="1") == 1
    assert "The loss of step 5 is not finite after 1 skipped; its images" in capsys.readouterr().err


def test_a_gradient_that_overflows_under_a_finite_loss_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = XceptionModule.training_step

    def overflowing(self: XceptionModule, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = step(self, batch, index)
        if self.trainer.global_step == 3:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    monkeypatch.setattr(XceptionModule, "training_step", overflowing)
    assert run(tmp_path, Poison()) == 1
    assert "The gradient of step 4 is not finite, though the loss is." in capsys.readouterr().err


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Spoil(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            if trainer.global_step == 3:
                with torch.no_grad():
                    next(pl_module.parameters())[0] = torch.inf

    assert run(tmp_path, Poison(), Spoil(), optim__ema_decay="0") == 1
    assert "After step 4 the loss is finite and the weights are not" in capsys.readouterr().err
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def run_as_rank(rank: int, steps: tuple[int, ...], skip: int) -> dict[str, Any]:
    """Only rank 1's images are poisoned; what this rank saw of it."""

    class Count(Callback):
        skipped = 0

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.skipped = next(found.skipped for found in trainer.callbacks if isinstance(found, StepGuard))  # type: ignore[attr-defined]

    poison, count, folder = Poison(*(steps if rank == 1 else ())), Count(), Path(f"rank {rank}")
    folder.mkdir()  # each writes its recipe there; the run is rank 0's
    changes = {"trainer__accelerator": "cpu", "trainer__skip_nonfinite_steps": str(skip)}
    code = run(folder, poison, count, ranks=Ranks(find_launcher()), **changes)
    return {"code": code, "rows": poison.rows, "states": poison.states, "skipped": count.skipped}


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_at_its_step(tmp_path: Path) -> None:
    ranks = on_ranks(2, run_as_rank, tmp_path, (4,), 0)
    assert [rank["code"] for rank in ranks] == [1, 1], printed(tmp_path, "err")
    assert [len(rank["states"]) for rank in ranks] == [4, 4]  # neither began a fifth step
    rows = ", ".join(map(str, ranks[1]["rows"]))
    assert len(ranks[1]["rows"]) == 4  # rank 1's half of the batch
    assert printed(tmp_path, "err") == (
        f"error: The loss of step 4 on rank 1 is not finite; its images are the training rows {rows}. "
        "The last good checkpoint is rank 0/run/checkpoints/last.ckpt.\n"
    )
    saved = torch.load(tmp_path / "rank 0/run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    for rank in ranks:
        assert same_state(saved["state_dict"], rank["states"][3]) == []  # no rank's weights were touched


def test_a_step_left_out_for_one_rank_is_left_out_and_counted_on_all(tmp_path: Path) -> None:
    ranks = on_ranks(2, run_as_rank, tmp_path, (2, 5), 2)
    assert [rank["code"] for rank in ranks] == [0, 0], printed(tmp_path, "err")
    assert [rank["skipped"] for rank in ranks] == [2, 2]
    for rank in ranks:
        changed = [bool(same_state(*pair)) for pair in zip(rank["states"], rank["states"][1:], strict=False)]
        assert changed == [True, False, True, True, False]
    assert same_state(ranks[0]["states"], ranks[1]["states"]) == []  # one network on both
    with open(tmp_path / "rank 0/run/metrics.csv", newline="") as file:
        counts = [(row["step"], row["skipped_steps"]) for row in csv.DictReader(file) if row["skipped_steps"]]
    assert counts == [("3", "1"), ("6", "2")]
