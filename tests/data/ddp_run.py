"""Run by test_ddp in processes of its own: trains a tracer on some ranks and writes down what each of them saw.

python -m tests.data.ddp_run WORLD FOLDER [corrupt | refused | CHECKPOINT]

With a checkpoint, of a run with another world, it goes on from there, with and without two accumulated batches a step.
With `corrupt`, one image of the last rank's first batch cannot be decoded; with `refused` the hub refuses the data. Each
rank then writes down how its run ended.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.data.tracing import SaveAt, Tracer, table, trainer
from xception_pl.data.config import DataConfig
from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.data.plan import EpochPlan

STEPS, EPOCHS = 8, 2


def config(folder: Path, world: int, **changes: Any) -> DataConfig:
    made: dict[str, Any] = {
        "source": "ILSVRC/imagenet-1k",
        "image_size": 71,
        "train_crop": "resize",
        "eval_crop": "resize",
        "flip": False,
        "global_batch": 24,
        "eval_batch": 4,
        "shuffle_window": 64,
        "cache_dir": str(folder / f"cache of {world}"),
    }
    return DataConfig(**{**made, **changes})


def fit(folder: Path, data: ImageNetDataModule, world: int, **options: Any) -> Tracer:
    tracer, ckpt = Tracer(), options.pop("ckpt_path", None)
    strategy = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    run = trainer(folder, max_epochs=EPOCHS, accumulate_grad_batches=data.accumulate, **strategy, **options)
    run.fit(tracer, data, ckpt_path=ckpt)
    return tracer


def end_with_a_corrupt_image(world: int, folder: Path) -> None:
    made = table(48)
    # of the last rank: rank 0 holds the store through which the others learn of it
    bad = EpochPlan(np.ones(48, np.int64), seed=1, epoch=0, global_batch=24).micro_batch(0, world - 1, world)[0]
    made = made.map(lambda row, i: {"image": {"bytes": b"", "path": None}} if i == bad else row, with_indices=True)
    end(world, folder, ImageNetDataModule(config(folder, world, workers=0), seed=1, train=made, val=table(4)))


def end(world: int, folder: Path, data: ImageNetDataModule) -> None:
    """Trains to an error, which each rank writes down."""
    try:
        fit(folder, data, world)
    except Exception as error:
        rank = os.environ.get("LOCAL_RANK", "0")
        (folder / f"end of rank {rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3:] == ["corrupt"]:
        end_with_a_corrupt_image(world, folder)
        return
    if sys.argv[3:] == ["refused"]:
        end(world, folder, ImageNetDataModule(config(folder, world, workers=0), seed=1))
        return
    if sys.argv[3:]:
        for accumulate in (1, 2):
            data = ImageNetDataModule(config(folder, world, workers=2), seed=1, accumulate=accumulate)
            trace = fit(folder, data, world, ckpt_path=sys.argv[3]).seen
            (folder / f"moved to {world}, accumulating {accumulate}.json").write_text(json.dumps(trace))
        return
    seen: dict[str, Any] = {}
    rank = 0
    for workers in (0, 2, 3):
        tracer = fit(folder, ImageNetDataModule(config(folder, world, workers=workers), seed=1), world)
        rank = tracer.global_rank
        seen[f"workers {workers}"] = {"train": tracer.seen, "val": tracer.evaluated}
    resumed, ckpt = [], None
    for stop in (3, 11, None):
        path = folder / f"world {world} step {stop}.ckpt"
        callbacks = [SaveAt(stop, path)] if stop else []
        data = ImageNetDataModule(config(folder, world, workers=2), seed=1)
        resumed += fit(folder, data, world, callbacks=callbacks, ckpt_path=ckpt).seen
        ckpt = path
    seen["resumed twice"] = {"train": resumed}
    one = ImageNetDataModule(config(folder, world, workers=0), seed=1, val=table(1))
    seen["one image to evaluate"] = {"val": fit(folder, one, world, limit_train_batches=1).evaluated}
    (folder / f"world {world} rank {rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
