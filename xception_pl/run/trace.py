"""What a run did at each step, to the bit, for comparing runs: `trace-RANK.csv` with images and loss."""

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Trace(Callback):
    """Appends a row a batch: optimiser steps made, batch, rows of the images, the loss in hexadecimal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"].detach()) * trainer.accumulate_grad_batches  # Lightning divided it
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"trace-{trainer.global_rank}.csv", "a", newline="") as file:
            ids = " ".join(map(str, batch["id"].tolist()))
            csv.writer(file).writerow([trainer.global_step, batch_idx, ids, loss.hex()])


def read_trace(folder: Path, rank: int = 0) -> dict[tuple[int, int], tuple[str, str]]:
    """(step, batch) to (images, loss); of a batch that was trained twice, after a kill, the last time."""
    with open(folder / f"trace-{rank}.csv", newline="") as file:
        return {(int(step), int(batch)): (ids, loss) for step, batch, ids, loss in csv.reader(file)}


def same_state(one: Any, other: Any) -> list[str]:
    """Where two nested states differ, to the bit: the dotted names."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        equal = one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))
        return [] if equal else [""]
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{name}" for name in one.keys() ^ other.keys()]
        for name in one.keys() & other.keys():
            found += [f"{name}.{inner}".rstrip(".") for inner in same_state(one[name], other[name])]
        return sorted(found)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [f"{i}.{inner}".rstrip(".") for i in range(len(one)) for inner in same_state(one[i], other[i])]
    return [] if one == other or (one != one and other != other) else [""]
