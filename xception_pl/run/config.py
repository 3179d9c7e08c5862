"""What a recipe may say about the run. Imports no torch."""

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(kw_only=True)
class TrainerConfig:
    """How training runs; the keys are those of `lightning.Trainer`, with its meanings."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Kind of device; `auto` takes GPUs where there are any."""
    devices: int | Literal["auto"] = "auto"
    """Devices a node; `auto` takes those of torchrun or srun, else all GPUs of this machine, or one CPU."""
    num_nodes: int | Literal["auto"] = "auto"
    """Nodes of the job; `auto` takes those of torchrun or srun, else one."""
    strategy: Literal["auto", "ddp"] = "auto"
    """`auto` is one process on one device and DDP on several."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    """Arithmetic of the training step."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision: `high` allows TF32 on NVIDIA GPUs."""
    max_epochs: int = 100
    """Epochs to train."""
    max_steps: int = -1
    """Optimiser steps at which training stops, if sooner than max_epochs; -1 for no limit."""
    accumulate_grad_batches: int | Literal["auto"] = "auto"
    """Batches whose gradients are averaged into one optimiser step; `auto` takes the fewest that max_device_batch allows."""
    max_device_batch: int | None = None
    """Images that a device takes at once, as far as its memory goes; null sets no limit."""
    gradient_clip_val: float | None = None
    """Largest norm (or value) of the gradient; null does not clip."""
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    """What gradient_clip_val bounds: the norm over all parameters, or each value."""
    sync_batchnorm: bool = False
    """Batch statistics over all devices instead of each device's own."""
    compress_gradients: bool = False
    """Exchange gradients between devices in bfloat16: half the bytes, for slow links."""
    timeout_seconds: int = 600
    """Seconds for which a device waits for the others in one operation before the job ends."""
    deterministic: bool = False
    """Only algorithms that give the same result in each run."""
    benchmark: bool = False
    """cuDNN tries its algorithms at the first step and takes the fastest."""
    limit_train_batches: int | None = None
    """Batches an epoch (per device; optimiser steps where accumulate_grad_batches is auto); null for all. Keys of `optim`
    that count epochs count whole ones all the same."""
    limit_val_batches: int | None = None
    """Batches a validation (per device); null for all."""
    check_val_every_n_epoch: int = 1
    """Epochs between validations."""
    val_check_interval: int | float = 1.0
    """Validations inside an epoch: a number of batches between them (counted as in limit_train_batches), or a fraction of the epoch;
    1.0 validates at its end."""
    skip_nonfinite_steps: int = 0
    """Steps of a run that may be left out because their loss or gradient is NaN or infinite; the next one stops the run."""
    log_every_n_steps: int = 50
    """Optimiser steps between rows of the log."""
    enable_progress_bar: bool = True
    """Show the progress bar."""


@dataclass(kw_only=True)
class RunConfig:
    """Where a run is written, and how often."""

    folder: str = "runs"
    """Folder of all runs; a run writes to FOLDER/NAME/TIME."""
    name: str | None = None
    """Name of the run's folder; null takes the recipe's file name."""
    save_every_steps: int = 0
    """Optimiser steps between checkpoints inside an epoch; 0 saves at the end of each epoch only."""
    save_every_minutes: float = 0.0
    """Minutes between checkpoints, by rank 0's clock, beside those of save_every_steps; 0 does not look at the clock."""
    rank_timeout_seconds: float = 60.0
    """Seconds without a sign of life after which a rank counts as lost and ends the others; one that is killed does so at once."""
    stall_seconds: float = 540.0
    """Seconds without a step of any rank after which the run ends; a minute above data.retry_seconds, and above the time
    to compile."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs `pip install xception_pl[wandb]`); null does not."""


def check_trainer(trainer: TrainerConfig) -> list[str]:
    """What is impossible in these values: one sentence each."""
    problems = []
    least = {
        "num_nodes": 1,
        "max_epochs": 1,
        "accumulate_grad_batches": 1,
        "max_device_batch": 1,
        "timeout_seconds": 1,
        "limit_train_batches": 1,
        "limit_val_batches": 1,
        "check_val_every_n_epoch": 1,
        "skip_nonfinite_steps": 0,
        "log_every_n_steps": 1,
    }
    for name, lowest in least.items():
        value = getattr(trainer, name)
        if value not in (None, "auto") and value < lowest:
            automatic = ", or auto" if name in ("num_nodes", "accumulate_grad_batches") else ""
            problems.append(f"trainer.{name} must be at least {lowest}{automatic}, not {value}.")
    if trainer.devices != "auto" and trainer.devices < 1:
        problems.append(f"trainer.devices must be at least 1, or auto, not {trainer.devices}.")
    if trainer.max_steps != -1 and trainer.max_steps < 1:
        problems.append(f"trainer.max_steps must be at least 1, or -1 for no limit, not {trainer.max_steps}.")
    problems += _check_interval(trainer)
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if limit is not None and accumulate != "auto" and accumulate > 0 and limit % accumulate:
        problems.append(
            f"trainer.limit_train_batches {limit} is no multiple of trainer.accumulate_grad_batches {accumulate}: "
            "the last step of an epoch would be made of fewer batches."
        )
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val <= 0:
        problems.append(f"trainer.gradient_clip_val must be above 0, or null, not {trainer.gradient_clip_val}.")
    if trainer.gradient_clip_val is None and trainer.gradient_clip_algorithm != "norm":
        problems.append("trainer.gradient_clip_algorithm has no effect without trainer.gradient_clip_val; give both.")
    return problems


def _check_interval(trainer: TrainerConfig) -> list[str]:
    interval, accumulate = trainer.val_check_interval, trainer.accumulate_grad_batches
    if isinstance(interval, float) and not 0 < interval <= 1:
        return [f"trainer.val_check_interval must be a number of batches, or a fraction from 0 to 1, not {interval}."]
    if isinstance(interval, int) and interval < 1:
        return [f"trainer.val_check_interval must be at least 1, not {interval}."]
    if isinstance(interval, int) and accumulate != "auto" and accumulate > 0 and interval % accumulate:
        return [
            f"trainer.val_check_interval {interval} is no multiple of trainer.accumulate_grad_batches {accumulate}: "
            "a validation would fall into a step."
        ]
    return []


def check_run(run: RunConfig) -> list[str]:
    """What is impossible in these values: one sentence each."""
    problems = []
    if run.save_every_steps < 0:
        problems.append(f"run.save_every_steps must be 0 (each epoch's end) or more, not {run.save_every_steps}.")
    if run.save_every_minutes < 0:
        problems.append(f"run.save_every_minutes must be 0 (not by the clock) or more, not {run.save_every_minutes}.")
    for name in ("rank_timeout_seconds", "stall_seconds"):
        if getattr(run, name) < 3:
            problems.append(f"run.{name} must be at least 3, not {getattr(run, name)}.")
    if run.name is not None and (run.name == ".." or not run.name or Path(run.name).name != run.name):
        problems.append(f"run.name must be a plain folder name, not {run.name!r}.")
    if not _writable(Path(run.folder)):
        problems.append(
            f"run.folder {run.folder} cannot be written to; choose another folder or change its permissions."
        )
    if run.wandb is not None and importlib.util.find_spec("wandb") is None:
        problems.append("run.wandb needs the package wandb; run `pip install wandb` or set run.wandb to null.")
    return problems


def _writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest parent of it that exists; leaves nothing behind."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # os.access says yes to root everywhere
            return True
    except OSError:
        return False
