"""Checkpoints: last and best; written whole or not at all, when a step is done, on whatever asks for it."""

import os
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from xception_pl.durable import CannotWrite, durable_write
from xception_pl.recipe import Recipe, to_plain
from xception_pl.run.guard import StepGuard
from xception_pl.run.interrupt import Interrupted
from xception_pl.weights.results import of_run
from xception_pl.weights.stored import Results

_RETRY_SECONDS, _GIVE_UP_SECONDS = 300.0, 3600.0
"""A save that failed is tried again; a run that cannot save goes on for an hour, in which somebody may make room."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that the target is always a whole one that was read back."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with durable_write(Path(path), check=check_checkpoint) as file:
            torch.save(checkpoint, file)


def check_checkpoint(path: Path) -> None:
    """Reads a checkpoint back: its structure as a resume would, and every byte against its checksum.

    Raises:
        Exception: whatever is wrong with it.
    """
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"checksum of {broken}")


class GivenUp(Exception):
    """For an hour no checkpoint could be written. The message is one sentence."""


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` after each epoch and validation, every `run.save_every_steps` optimiser steps or
    `run.save_every_minutes` of rank 0's clock, and `best.ckpt` where the held-out score is highest. On a signal saves and
    raises Interrupted at the next step, or at the next batch of a validation, which the resumed run then begins again.

    Attributes:
        saved: The newest checkpoint of this run, or the one from which it resumed; None where there is none yet.
        saved_here: This process has saved one.
    """

    def __init__(self, folder: Path, *, recipe: Recipe, guard: StepGuard) -> None:
        self.folder = folder
        self.recipe, self.data = to_plain(recipe), recipe.data
        self.monitor = "val_map100" if recipe.optim.loss == "sigmoid" else "val_top1"
        self.save_every_steps = recipe.run.save_every_steps
        self.save_every_minutes = recipe.run.save_every_minutes
        self.guard = guard
        self.agreement = guard.agreement
        self.agreement.save_due = self._due
        self.agreement.giving_up = self._gives_up
        self.best: float | None = None
        self.saved: Path | None = None
        self.saved_here = False
        self._better = False
        self._measured: tuple[int, Results] | None = None
        self._saved_at = time.monotonic()
        self._failing_since: float | None = None
        self._failure: CannotWrite | None = None
        self._validation_due = self._due_on_resume = False

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def last_good(self) -> str:
        """Where a run that fails now can go on, as rank 0 knows it."""
        return "There is no checkpoint yet." if self.saved is None else f"The last good checkpoint is {self.saved}."

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        self.agreement.exchange(trainer.strategy.root_device, wait=True)
        if self.agreement.signal:
            self._stop(trainer)
        if self._due_on_resume:
            self._validate(trainer)
            self._due_on_resume = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self.agreement.look()
        if self.agreement.give_up:
            raise GivenUp(f"No checkpoint could be written for {_GIVE_UP_SECONDS / 60:.0f} minutes.")
        if trainer.is_last_batch:
            return  # saved at the epoch's end, after its validation
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
        if self.agreement.signal:
            self._save_and_stop(trainer, validation_due=due)
        by_steps = self.save_every_steps and trainer.global_step % self.save_every_steps == 0
        if (by_steps or self.agreement.save) and not due:
            self._save(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.agreement.exchange(trainer.strategy.root_device)
        if self.agreement.signal:
            if trainer.state.fn == TrainerFn.FITTING and not self._due_on_resume:
                self._save_and_stop(trainer, validation_due=True)
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._measured = (trainer.global_step, of_run(found, self.data.source, self.data.val_split))
        score = found.get(self.monitor)
        better = score is not None and (self.best is None or score > self.best)
        if better:
            self.best = score
        self._better |= better
        if self._due_on_resume:
            self._keep_if_best(trainer)
        elif not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        if self.agreement.signal and not trainer.fit_loop.done:
            self._stop(trainer)

    def _validate(self, trainer: Trainer) -> None:
        """Runs the validation in which, or before which, the run was stopped; Lightning would go on in its middle."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def _due(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint."""
        since = time.monotonic() - self._saved_at
        if self._failing_since is not None:
            return since > _RETRY_SECONDS
        return 0 < self.save_every_minutes * 60 < since

    def _gives_up(self) -> bool:
        return self._failing_since is not None and time.monotonic() - self._failing_since > _GIVE_UP_SECONDS

    def _save(self, trainer: Trainer, *, validation_due: bool = False) -> None:
        """Saves; a failure to write is told, and the run goes on with the checkpoint before."""
        self.guard.check(trainer, trainer.lightning_module)
        self._validation_due = validation_due
        self._saved_at, self.agreement.save = time.monotonic(), False
        try:
            trainer.save_checkpoint(self.last)
        except CannotWrite as error:  # on rank 0 alone: the others wait for it where a save ends
            trainer.strategy.barrier("Trainer.save_checkpoint()")
            self._failure = error
            self._failing_since = self._failing_since or time.monotonic()
            print(
                f"warning: step {trainer.global_step} is not saved: {error} Training goes on, and saving is tried again "
                f"after {_RETRY_SECONDS / 60:.0f} minutes. {self.last_good()}",
                file=sys.stderr,
                flush=True,
            )
        else:
            self._failure = self._failing_since = None
            self.saved, self.saved_here = self.last, True
            self._keep_if_best(trainer)

    def _save_and_stop(self, trainer: Trainer, *, validation_due: bool = False) -> None:
        self._save(trainer, validation_due=validation_due)
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        at = self.agreement.signals.at
        raise Interrupted(
            signal.Signals(self.agreement.signal).name,
            self.saved,
            seconds=None if at is None else time.monotonic() - at,
            lost=None if self._failure is None else str(self._failure),
        )

    def _keep_if_best(self, trainer: Trainer) -> None:
        """`best.ckpt` is the newest checkpoint, where that holds the weights of the best validation."""
        source, better, self._better = self.saved, self._better, False
        if not better or source is None or not trainer.is_global_zero:
            return
        best, link = self.folder / "best.ckpt", self.folder / "best.ckpt.link"
        try:
            link.unlink(missing_ok=True)
            os.link(source, link)  # free: the next save renames over last.ckpt and leaves this file alone
            os.replace(link, best)
        except OSError:  # a file system without links
            with durable_write(best, check=check_checkpoint) as file, open(source, "rb") as last:
                shutil.copyfileobj(last, file)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe
        checkpoint["validation_due"] = self._validation_due
        if self._measured is not None and self._measured[0] == trainer.global_step:
            checkpoint["results"] = self._measured[1]  # of the weights in it that are evaluated
        loops = checkpoint["loops"]["fit_loop"]
        evaluated = loops["epoch_loop.val_loop.batch_progress"]  # no validation goes on in its middle
        for counts in (evaluated["total"], evaluated["current"]):
            counts.update(dict.fromkeys(counts, 0))
        evaluated["is_last_batch"] = True
        if trainer.validating:
            _leave_validation(loops, last_batch=trainer.is_last_batch)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._due_on_resume = checkpoint.get("validation_due", False)
        assert trainer.ckpt_path is not None
        self.saved = Path(trainer.ckpt_path)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def _leave_validation(loops: dict[str, Any], *, last_batch: bool) -> None:
    """Rewrites Lightning's progress, saved in or after a validation, to what it is where Lightning resumes well.

    That is at the end of a training batch, or, where the validation is that of an epoch's end, at the end of the epoch.
    """
    for which in ("total", "current"):
        if last_batch:
            loops["epoch_progress"][which]["processed"] += 1
        else:
            loops["epoch_loop.batch_progress"][which]["completed"] -= 1
    if last_batch:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
