"""What a run logs and when: training metrics, learning rate and throughput each window of steps; validation as it comes."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.module import XceptionModule
from xception_pl.run.guard import StepGuard
from xception_pl.run.metrics_csv import MetricsCsv


class RunLog(Callback):
    """Writes a row every `log_every_n_steps` optimiser steps and after each validation, to every logger.

    Attributes:
        latest: The newest value of each metric, for the progress bar and the final table.
        validated_step: Optimiser step of the newest validation.
    """

    def __init__(self, global_batch: int, every_n_steps: int) -> None:
        self.global_batch = global_batch
        self.every_n_steps = every_n_steps
        self.latest: dict[str, float] = {}
        self._clock = _Clock()
        self._logged_step = 0
        self._validation_due = False
        self.validated_step = -1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._validation_due = checkpoint.get("validation_due", False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged_step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.drop_after(trainer.global_step, validation=self._validation_due)
        self._clock.restart()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.skip()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._clock.batch_arrived()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._clock.step_done()
        steps = trainer.global_step - self._logged_step
        if trainer.fit_loop._should_accumulate() or not steps:
            return
        if trainer.global_step % self.every_n_steps == 0 or trainer.is_last_batch:
            assert isinstance(pl_module, XceptionModule)
            row = pl_module.train_results() | {
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
                "images_per_second": steps * self.global_batch / self._clock.seconds(),
                "data_wait": self._clock.wait_share(),
            }
            for guard in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(guard, StepGuard) and guard.skip:
                    row["skipped_steps"] = guard.skipped
            self._write(trainer, row)
            self._clock.restart()
            self._logged_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        self._check_count(trainer, row["val_images"])
        self._write(trainer, row)
        self.validated_step = trainer.global_step
        self._clock.skip()

    def _check_count(self, trainer: Trainer, counted: float) -> None:
        """Each held-out image counts once, on however many ranks: the sum over all of them says so."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageNetDataModule) or data.config.val_corrupt == "skip":
            return
        whole = isinstance(trainer.limit_val_batches, float)  # an int is the recipe's limit
        assert not whole or counted == data.val_images, f"validation counted {counted:.0f} of {data.val_images} images"

    def _write(self, trainer: Trainer, row: dict[str, float]) -> None:
        self.latest |= row
        epoch = trainer.global_step * self.global_batch / self._images_per_epoch(trainer)
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": epoch, **row}, step=trainer.global_step)

    def _images_per_epoch(self, trainer: Trainer) -> int:
        return int(trainer.num_training_batches) * self.global_batch // trainer.accumulate_grad_batches


class _Clock:
    """Wall time of a window of steps, and the share of it that the loop waited for data.

    On a GPU the host runs ahead: waiting counts only where the host itself waits.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._waited = 0.0

    def skip(self) -> None:
        """Takes the time since the last step (validation, saving) out of the window."""
        now = time.perf_counter()
        self._start += now - self._mark
        self._mark = now

    def batch_arrived(self) -> None:
        now = time.perf_counter()
        self._waited += now - self._mark
        self._mark = now

    def step_done(self) -> None:
        self._mark = time.perf_counter()

    def seconds(self) -> float:
        return self._mark - self._start

    def wait_share(self) -> float:
        return self._waited / self.seconds()
