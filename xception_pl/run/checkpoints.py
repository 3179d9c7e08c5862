"""Checkpoints: last, best, and the averaged weights; written whole or not at all."""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from xception_pl.durable import durable_write
from xception_pl.module import XceptionModule
from xception_pl.recipe import Recipe, to_plain
from xception_pl.run.interrupt import Interrupted, SignalFlag
from xception_pl.weights.safetensors import save_weights


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


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` each epoch (and every `save_every_steps` optimiser steps), `best.ckpt` where the held-out score is highest,
    and `averaged.safetensors` when training ends; on a signal saves and raises Interrupted at the next step.
    """

    def __init__(self, folder: Path, *, recipe: Recipe, signals: SignalFlag) -> None:
        self.folder = folder
        self.recipe = to_plain(recipe)
        self.monitor = "val_map100" if recipe.optim.loss == "sigmoid" else "val_top1"
        self.save_every_steps = recipe.run.save_every_steps
        self.signals = signals
        self.best: float | None = None
        self._saved_step = -1

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        between_steps = trainer.global_step != self._saved_step and not trainer.fit_loop._should_accumulate()
        if trainer.is_last_batch or not between_steps:
            return  # the last batch is saved after validation, with its result
        if self._signalled(trainer):
            self._save_and_stop(trainer)
        if self.save_every_steps and trainer.global_step % self.save_every_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        score = trainer.callback_metrics.get(self.monitor)
        better = score is not None and (self.best is None or float(score) > self.best)
        if better:
            assert score is not None
            self.best = float(score)
        self._save(trainer)
        if better and trainer.is_global_zero:
            self._copy_to_best()
        if self._signalled(trainer) and not trainer.fit_loop.done:
            self._save_and_stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, XceptionModule)
            save_weights(pl_module, self.folder / "averaged.safetensors")

    def _signalled(self, trainer: Trainer) -> bool:
        """Whether any rank got a signal: all ranks must leave at the same step."""
        if trainer.world_size == 1:
            return self.signals.received is not None
        return bool(trainer.strategy.reduce_boolean_decision(self.signals.received is not None, all=False))

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.last)
        self._saved_step = trainer.global_step

    def _save_and_stop(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        raise Interrupted(self.signals.received or "SIGTERM", self.last)

    def _copy_to_best(self) -> None:
        best, link = self.folder / "best.ckpt", self.folder / "best.ckpt.link"
        try:
            link.unlink(missing_ok=True)
            os.link(self.last, link)  # free: the next save renames over last.ckpt and leaves this file alone
            os.replace(link, best)
        except OSError:  # a file system without links
            with durable_write(best, check=check_checkpoint) as file, open(self.last, "rb") as last:
                shutil.copyfileobj(last, file)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
