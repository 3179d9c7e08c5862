"""What several tests share: small data in memory and a module that writes down which images it was shown."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image

CLASSES = 10


def png(value: int, side: int = 4) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value % 256, np.uint8)).save(out, "PNG")
    return out.getvalue()


def features(names: int = CLASSES) -> datasets.Features:
    return datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {i}" for i in range(names)])}
    )


def table(rows: int, labels: Sequence[int] | None = None) -> datasets.Dataset:
    """`rows` images whose pixels are their row number and whose label is it modulo the classes."""
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(i), "path": None} for i in range(rows)],
            "label": [i % CLASSES for i in range(rows)] if labels is None else list(labels),
        },
        features=features(),
    )


class Tracer(pl.LightningModule):
    """Trains one weight and keeps the row ids of each training batch and the counted ids of each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen.append(batch["id"].tolist())
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.evaluated += batch["id"][batch["valid"]].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveAt(pl.Callback):
    """Saves a checkpoint at the end of the batch after which `step` optimiser steps are done, and stops there."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step and (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**defaults, **options})
