"""From a recipe to the objects that train it."""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, LayerSync, Precision
from torch import nn

from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.kernels.choose import use_kernels
from xception_pl.module import XceptionModule
from xception_pl.nets.create import create_network
from xception_pl.recipe import Recipe, RecipeError, accumulated_batches
from xception_pl.run.agreement import Agreement
from xception_pl.run.checkpoints import Checkpoints, DurableCheckpointIO
from xception_pl.run.config import TrainerConfig
from xception_pl.run.ddp import Ddp, SyncNorm
from xception_pl.run.events import Events
from xception_pl.run.guard import StepGuard
from xception_pl.run.interrupt import SignalFlag, keep_handlers
from xception_pl.run.launcher import Launcher
from xception_pl.run.log import RunLog
from xception_pl.run.metrics_csv import MetricsCsv
from xception_pl.run.progress import ProgressLine
from xception_pl.run.watchdog import Watchdog
from xception_pl.weights.start import Start, start_from


def build_data(recipe: Recipe, *, ranks: int = 1) -> ImageNetDataModule:
    """The data that a recipe names, for so many devices; nothing is read yet."""
    return ImageNetDataModule(
        recipe.data,
        seed=recipe.seed,
        in_chans=recipe.model.in_chans,
        num_classes=recipe.model.num_classes,
        multi_label=recipe.optim.loss == "sigmoid",
        accumulate=accumulated_batches(recipe, ranks),
    )


def build_module(
    recipe: Recipe,
    *,
    images_per_epoch: int | None,
    total_steps: int | None,
    class_names: list[str] | None = None,
    class_weights: list[float] | None = None,
    start: Start | None = None,
) -> XceptionModule:
    """The network and its training; weights follow from the recipe's seed, or are those of `start`."""
    torch.manual_seed(recipe.seed)
    return XceptionModule(
        recipe.model,
        recipe.optim,
        images_per_epoch=images_per_epoch or 1,
        global_batch=recipe.data.global_batch,
        total_steps=total_steps or 1,
        class_names=class_names,
        class_weights=class_weights,
        preprocessing={"image_size": recipe.data.image_size, "eval_crop": recipe.data.eval_crop},
        network=None if start is None else start.network,
    )


def build_start(recipe: Recipe, class_names: list[str] | None = None) -> Start | None:
    """The network that `model.weights` gives; None where it is null. What is new in it follows from the recipe's seed.

    Raises:
        WeightsError: the weights cannot be read, or do not fit.
    """
    if recipe.model.weights is None:
        return None
    torch.manual_seed(recipe.seed)
    return start_from(recipe.model, class_names)


def choose_kernels(recipe: Recipe, network: nn.Module, accelerator: Literal["cpu", "gpu"]) -> str:
    """Switches the network to the kernels that `model.kernels` means here; returns which and why, as the plan says it.

    Raises:
        RecipeError: `fused` is asked for, and not possible.
    """
    kernels = recipe.model.kernels
    if kernels == "auto" and recipe.model.compile:
        return "torch: model.compile compiles the plain layers"
    if kernels == "auto" and recipe.trainer.precision == "64-true":
        return "torch: fused kernels have no float64"
    if kernels != "torch" and recipe.trainer.sync_batchnorm:
        if kernels == "fused":
            raise RecipeError(["model.kernels fused does not go with trainer.sync_batchnorm: set it to auto or torch."])
        return "torch: fused kernels take the statistics of one device, not those of trainer.sync_batchnorm"
    try:
        return use_kernels(network, kernels, torch.device("cuda" if accelerator == "gpu" else "cpu"))
    except ValueError as error:
        raise RecipeError([str(error)]) from error


def check_network(recipe: Recipe) -> list[str]:
    """Whether the network can be built and takes the recipe's images: tried without memory or arithmetic."""
    size, channels = recipe.data.image_size, recipe.model.in_chans
    try:
        with torch.device("meta"):
            network = create_network(recipe.model).eval()
    except ValueError as error:
        return [f"{error}."] if not str(error).endswith((".", "?")) else [str(error)]
    try:
        network(torch.empty(2, channels, size, size, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        return [f"model.name {recipe.model.name} does not take images of data.image_size {size}: {error}"]
    return []


def find_devices(
    config: TrainerConfig, launcher: Launcher | None = None
) -> tuple[Literal["cpu", "gpu"], int, list[str]]:
    """Accelerator and devices a node, and what the recipe asks for that this machine, or the launcher, does not give.

    One process drives one device: where a launcher started the processes, their number a node decides.
    """
    gpus = torch.cuda.device_count()
    wants_gpu = config.accelerator == "gpu" or (config.accelerator == "auto" and gpus > 0)
    if launcher is not None and config.devices not in ("auto", launcher.ranks_per_node):
        return (
            "gpu" if wants_gpu else "cpu",
            launcher.ranks_per_node,
            [
                f"trainer.devices is {config.devices}, but {launcher.name} started {launcher.ranks_per_node} processes a "
                "node: set it to auto, or start one process for each device."
            ],
        )
    started = launcher.ranks_per_node if launcher is not None else None
    if not wants_gpu:
        devices = started or (1 if config.devices == "auto" else config.devices)
        if config.precision == "16-mixed":
            return "cpu", devices, ["trainer.precision 16-mixed needs a GPU; on a CPU choose bf16-mixed or 32-true."]
        return "cpu", devices, []
    devices = started or (max(gpus, 1) if config.devices == "auto" else config.devices)
    if gpus < devices:
        whose = "trainer.devices" if launcher is None else f"{launcher.name}'s processes a node,"
        return "gpu", devices, [f"{whose} {devices} on trainer.accelerator gpu: this machine has {gpus} GPUs."]
    return "gpu", devices, []


def find_nodes(config: TrainerConfig, launcher: Launcher | None = None) -> tuple[int, list[str]]:
    """Nodes of the job, and why the recipe's number cannot be had."""
    if launcher is None:
        nodes = 1 if config.num_nodes == "auto" else config.num_nodes
        if nodes == 1 or "NODE_RANK" in os.environ:  # Lightning's way: the user starts one process on each node
            return nodes, []
        return nodes, [
            f"trainer.num_nodes is {nodes}, but nothing started this process on other nodes too: use "
            "`python -m xception_pl.submit`, srun or torchrun."
        ]
    if config.num_nodes in ("auto", launcher.nodes):
        return launcher.nodes, []
    return launcher.nodes, [
        f"trainer.num_nodes is {config.num_nodes}, but {launcher.name} started processes on {launcher.nodes} nodes: "
        "set it to auto, or ask for as many."
    ]


def build_trainer(
    recipe: Recipe,
    folder: Path,
    *,
    accelerator: str,
    devices: int,
    num_nodes: int | None = None,
    launcher: Launcher | None = None,
    signals: SignalFlag,
    callbacks: Sequence[Callback] = (),
) -> tuple[Trainer, RunLog]:
    """Lightning's Trainer with this project's loggers and callbacks, writing to `folder`.

    Args:
        recipe: What to train.
        folder: The run's.
        accelerator: cpu or gpu.
        devices: A node.
        num_nodes: None takes the recipe's.
        launcher: What started the processes of the job; None lets Lightning start those of this node.
        signals: Which the run looks at between steps.
        callbacks: Further ones.
    """
    config = recipe.trainer
    if num_nodes is None:
        num_nodes, _ = find_nodes(config, launcher)
    ranks = devices * num_nodes
    accumulate = accumulated_batches(recipe, ranks)
    in_batches = accumulate if config.accumulate_grad_batches == "auto" else 1  # else the recipe counts batches itself
    limit, interval = config.limit_train_batches, config.val_check_interval
    limit = limit * in_batches if limit is not None else None
    interval = interval * in_batches if isinstance(interval, int) else interval
    _quiet()
    torch.set_float32_matmul_precision(config.matmul_precision)
    log = RunLog(recipe.data.global_batch, config.log_every_n_steps)
    guard = StepGuard(Agreement(signals), config.skip_nonfinite_steps)
    checkpoints = Checkpoints(folder / "checkpoints", recipe=recipe, guard=guard)
    callbacks = [
        StepSeed(recipe.seed),
        guard,
        log,
        checkpoints,
        Watchdog(recipe.run, checkpoints),
        *callbacks,
    ]
    if config.enable_progress_bar:
        callbacks.append(ProgressLine(log))
    plugins: list[Precision | ClusterEnvironment | CheckpointIO | LayerSync] = [DurableCheckpointIO()]
    if ranks > 1 or config.strategy == "ddp":
        plugins += [SyncNorm()] if config.sync_batchnorm else []
    else:
        plugins.append(LightningEnvironment())  # alone in a SLURM job too: Lightning would take the job's signals
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=Ddp(launcher, timeout_seconds=config.timeout_seconds, compress=config.compress_gradients)
        if config.strategy == "ddp" or ranks > 1
        else "auto",
        precision=config.precision,
        max_epochs=config.max_epochs,
        max_steps=config.max_steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=config.gradient_clip_val,
        gradient_clip_algorithm=config.gradient_clip_algorithm,
        deterministic=config.deterministic,
        benchmark=config.benchmark,
        limit_train_batches=limit,
        limit_val_batches=config.limit_val_batches,
        check_val_every_n_epoch=config.check_val_every_n_epoch,
        val_check_interval=interval,
        log_every_n_steps=config.log_every_n_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the plan deals the rows to ranks
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        plugins=plugins,
        logger=build_loggers(recipe, folder),
        default_root_dir=folder,
    )
    keep_handlers(trainer)
    return trainer, log


def build_loggers(recipe: Recipe, folder: Path) -> list[Logger]:
    """`metrics.csv` always; TensorBoard and W&B as the recipe says."""
    folder.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = [MetricsCsv(folder / "metrics.csv")]
    if recipe.run.tensorboard:
        loggers.append(Events(folder, name="", version="tensorboard"))
    if recipe.run.wandb is not None:
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project=recipe.run.wandb, name=f"{recipe.run.name}/{folder.name}", save_dir=folder))
    return loggers


class StepSeed(Callback):
    """Seeds torch before each batch from the run's seed, the step and the rank.

    Dropout is then a function of the step, and a resumed run draws what an uninterrupted one would, with no random
    state to save for each rank.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        position = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
        # torch.manual_seed would do, but where CUDA is compiled in and not in use, it keeps a stack trace for later: each step.
        torch.default_generator.manual_seed(seed)
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.manual_seed(seed)


def _quiet() -> None:
    """Silences what Lightning says to everyone and what does not hold here."""
    for room in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(room).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*module\\(s\\) in eval mode.*",  # the averaged network is always in eval mode
        ".*dataloader is not resumable.*",  # ours starts at the step it is asked for
        ".*is smaller than the logging interval.*",
        ".*`srun` command is available.*",  # on a login node too
        ".*Checkpoint directory.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
