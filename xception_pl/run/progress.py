"""The progress bar: step, loss, top-1, images/s, share of waiting for data, time left. Lines instead, where there is no terminal."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from xception_pl.run.log import RunLog

_LINE_EVERY_SECONDS = 10


class ProgressLine(Callback):
    """One bar for the whole run on a terminal; elsewhere (a log file, CI) a line every ten seconds."""

    def __init__(self, run_log: RunLog) -> None:
        self.run_log = run_log
        self._console = Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._first_step = self._total = 0
        self._started = self._printed = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        self._total = int(pl_module.hparams["total_steps"])  # the plan's; Lightning's estimate breaks restoring
        self._started = self._printed = time.monotonic()
        if trainer.is_global_zero and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=16), console=self._console, transient=True
            )
            self._task = self._bar.add_task(self._text(trainer), total=self._total, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._show(trainer, self._text(trainer))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.training and self._started:
            self._show(trainer, f"validating {batch_idx + 1}/{int(trainer.num_val_batches[0])}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._started:
            results = [
                f"{name} {value:.4f}"
                for name, value in self.run_log.latest.items()
                if name.startswith("val_") and name != "val_images"
            ]
            where = f"step {trainer.global_step}/{self._total}"
            self._console.print(f"{where}  {'  '.join(results)}", highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, trainer: Trainer, text: str) -> None:
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(self._task, description=text, completed=trainer.global_step)
        elif time.monotonic() - self._printed > _LINE_EVERY_SECONDS:
            self._printed = time.monotonic()
            self._console.print(text, highlight=False, soft_wrap=True)

    def _text(self, trainer: Trainer) -> str:
        latest, total = self.run_log.latest, self._total
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", f"step {trainer.global_step}/{total}"]
        if "train_loss" in latest:
            parts.append(f"loss {latest['train_loss']:.3f}")
            parts += [f"top-1 {latest['train_top1']:.3f}"] if "train_top1" in latest else []
            parts.append(f"{latest['images_per_second']:.0f} img/s")
            parts.append(f"data wait {latest['data_wait']:.0%}")
        done = trainer.global_step - self._first_step
        if done:
            seconds = (time.monotonic() - self._started) / done * (total - trainer.global_step)
            parts.append(f"{_clock(seconds)} left")
        return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
