"""Where Lightning's trainer is in the plan: its progress, as 2.6.6 counts it, to a position, and back when a run changes."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.loop import _Loop

from xception_pl.data.errors import DataError
from xception_pl.data.item import Position


def train_position(trainer: pl.Trainer | None) -> Position:
    """The training batch that the trainer is at; the start of epoch 0 without one."""
    if trainer is None:
        return 0, 0
    fit = trainer.fit_loop
    progress: Any  # of a class whose type Lightning does not tell
    for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
        # An epoch is not counted as begun when it follows a checkpoint of the last batch of the one before; a checkpoint
        # saved inside it would then be taken for a finished epoch's, and start it again.
        progress.ready = progress.started = progress.processed + 1
    return progress.processed, fit.batch_idx + 1


def resumes_between_epochs(trainer: pl.Trainer | None) -> bool:
    """Whether the checkpoint that is being loaded was saved when an epoch was done.

    Where `max_steps` is set Lightning takes such an epoch up again, finds no batch left in it, and counts it a second
    time: the next one would be skipped. Without `max_steps` it starts the next epoch; so it does here.
    """
    if trainer is None:
        return False
    fit = trainer.fit_loop
    progress: Any = fit.epoch_progress.current
    if progress.processed != progress.ready:
        return False
    setter: Any = _Loop.restarting
    setter.fset(fit, False)  # not the fit loop's own, which insists
    return True


def recount(trainer: pl.Trainer | None, before: int, now: int) -> None:
    """Translate the trainer's progress, counted in micro-batches, from `before` of them a step to `now`.

    Lets a run that moves to fewer devices and accumulates more go on inside the epoch.

    Raises:
        DataError: the checkpoint lies between two batches of one step.
    """
    if before == now or trainer is None:
        return
    batches = trainer.fit_loop.epoch_loop.batch_progress
    progress: Any
    for progress in (batches.total, batches.current):
        behind = progress.ready - progress.completed  # 1 in a checkpoint saved at a batch's end
        if progress is batches.current and progress.ready % before:
            raise DataError(
                f"The checkpoint lies between two of {before} accumulated batches: resume with the same "
                "accumulation, or from a checkpoint saved at the end of a step."
            )
        progress.ready = progress.started = progress.processed = progress.ready // before * now
        progress.completed = progress.ready - behind
