"""XceptionModule: a network with its loss, metrics, optimiser, schedule and averaged weights."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from xception_pl.metrics import MeanAveragePrecisionAtK
from xception_pl.nets.config import ModelConfig
from xception_pl.nets.create import create_network
from xception_pl.nets.freezing import freeze
from xception_pl.nets.probabilities import probabilities
from xception_pl.nets.step_statistics import StepStatistics
from xception_pl.optim.averaging import PolyakAverage
from xception_pl.optim.config import OptimConfig
from xception_pl.optim.create import create_optimizer
from xception_pl.optim.losses import loss_function
from xception_pl.optim.schedules import learning_rate


class XceptionModule(LightningModule):
    """Trains a network as the paper does (sections 4.2 and 4.3) and evaluates its averaged weights.

    Batches are dictionaries: `image` float (B, C, S, S) in [-1, 1], `label` int64 (B,) or multi-hot (B, K),
    optionally `target` soft labels (B, K) for the loss, and in evaluation `valid` bool (B,).

    Args:
        model: The network; a mapping of ModelConfig's keys will do.
        optim: Optimiser, schedule and loss; a mapping of OptimConfig's keys will do.
        images_per_epoch: Training images an epoch, of which the schedule in epochs is made.
        global_batch: Images an optimiser step, over all devices.
        total_steps: Optimiser steps of the whole training, the length of a cosine schedule.
        class_names: Names of the classes, kept with the weights.
        class_weights: Weights of the classes in MAP@100; None for equal ones.
        preprocessing: How evaluation images were prepared (`image_size`, `eval_crop`), kept with the weights.
        network: Goes on from this network, built as `model` says; None makes a fresh one.
    """

    def __init__(
        self,
        model: ModelConfig | dict[str, Any] | None = None,
        optim: OptimConfig | dict[str, Any] | None = None,
        *,
        images_per_epoch: int = 1_281_167,
        global_batch: int = 256,
        total_steps: int = 500_000,
        class_names: list[str] | None = None,
        class_weights: list[float] | None = None,
        preprocessing: dict[str, Any] | None = None,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model_config = ModelConfig(**model) if isinstance(model, dict) else model or ModelConfig()
        self.optim_config = OptimConfig(**optim) if isinstance(optim, dict) else optim or OptimConfig()
        self.model_config.fc_units = tuple(self.model_config.fc_units)
        # Only YAML's types: a checkpoint must load with weights_only=True and with no further argument.
        self.save_hyperparameters(
            {
                "model": asdict(self.model_config) | {"fc_units": list(self.model_config.fc_units)},
                "optim": asdict(self.optim_config),
                "images_per_epoch": images_per_epoch,
                "global_batch": global_batch,
                "total_steps": total_steps,
                "class_names": class_names,
                "class_weights": class_weights,
                "preprocessing": preprocessing,
            }
        )
        self.class_names = class_names
        self.network = create_network(self.model_config) if network is None else network
        self._frozen = freeze(self.network, self.model_config.freeze, statistics=self.model_config.freeze_statistics)
        if self.model_config.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.average = PolyakAverage(self.network, self.optim_config.ema_decay) if self.optim_config.ema_decay else None
        self.loss = loss_function(self.optim_config)
        self.val_loss = loss_function(replace(self.optim_config, label_smoothing=0.0))
        self.train_metrics, self.val_metrics = self._metrics(), self._metrics()
        self.val_metrics["images"] = SumMetric()
        self._statistics: StepStatistics | None = None

    loss_is_finite: Tensor | None = None
    """Bool scalar: of all losses since whoever reads it, before an optimiser step, set it to None."""
    skip_update = False
    """Set by who has taken the gradients of a step away: the averaged weights do not follow either."""

    def _metrics(self) -> nn.ModuleDict:
        scores: dict[str, nn.Module]
        if self.optim_config.loss == "sigmoid":
            scores = {"map100": MeanAveragePrecisionAtK(self.hparams["class_weights"])}
        else:
            classes = self.model_config.num_classes
            scores = {
                f"top{k}": MulticlassAccuracy(classes, average="micro", top_k=min(k, classes), validate_args=False)
                for k in (1, 5)
            }
        # Looking for NaN would wait for the device in each step; training_step leaves out what is not finite.
        return nn.ModuleDict({"loss": MeanMetric(nan_strategy="disable"), **scores})

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated, exported and used for prediction: the averaged network, or the network where averaging is off."""
        return self.network if self.average is None else self.average.network

    def train(self, mode: bool = True) -> "XceptionModule":
        """Training or evaluation mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        return learning_rate(
            self.optim_config,
            step,
            images_per_epoch=self.hparams["images_per_epoch"],
            global_batch=self.hparams["global_batch"],
            total_steps=self.hparams["total_steps"],
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, S, S) in [-1, 1], from the weights that are evaluated."""
        logits: Tensor = self.evaluated(self._layout(images))
        return logits

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """Probabilities (B, K) of images (B, C, H, W): uint8, or float already scaled to [-1, 1].

        The whole image is seen, at the size given: crop or resize before.
        """
        if images.dim() != 4:
            raise ValueError(
                f"predict needs images of shape (B, C, H, W), not {tuple(images.shape)}; a single one is images[None]."
            )
        training = self.training
        self.eval()
        scaled = images.to(self.device)
        scaled = scaled.float() / 127.5 - 1 if images.dtype == torch.uint8 else scaled
        found = probabilities(self(scaled), self.optim_config.loss)
        self.train(training)
        return found

    def _layout(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype)  # float64 where the precision is 64-true
        return images.contiguous(memory_format=torch.channels_last) if self.model_config.channels_last else images

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self._statistics is None:  # outside a Trainer's fit
            logits = self.network(self._layout(batch["image"]))
        else:
            last = not self.trainer.fit_loop._should_accumulate()
            self._statistics.batch_begins(last=last)
            logits = self.network(self._layout(batch["image"]))
            self._statistics.batch_ends(last=last)
        loss = self.loss(logits, batch.get("target", batch["label"]))
        finite = loss.detach().isfinite()
        self.loss_is_finite = finite if self.loss_is_finite is None else self.loss_is_finite & finite
        _update(self.train_metrics, loss.detach(), logits.detach(), batch["label"], counts=finite)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits, labels = self(batch["image"]).float(), batch["label"]
        if "valid" in batch:  # rows that only fill a short rank's batch do not count
            logits, labels = logits[batch["valid"]], labels[batch["valid"]]
        if len(labels):
            _update(self.val_metrics, self.val_loss(logits, labels), logits, labels)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Row ids and probabilities of the batch's valid rows."""
        valid = batch.get("valid", torch.ones_like(batch["id"], dtype=torch.bool))
        found = probabilities(self(batch["image"]), self.optim_config.loss)
        return {"id": batch["id"][valid], "probabilities": found[valid]}

    def on_fit_start(self) -> None:
        if self.model_config.compile:
            self.network.compile()  # in place: torch.compile(network) would put a prefix on every key of the state dict

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val_{name}": metric for name, metric in _each(self.val_metrics)}, logger=False)

    def configure_optimizers(self) -> Optimizer:
        return create_optimizer(self.optim_config, self.network)

    def on_train_start(self) -> None:
        self._statistics = StepStatistics(self.network)  # here the network is on its device
        # A checkpoint restores the optimiser's settings with its state: a recipe changed since (and named by the plan)
        # must win.
        (optimizer,) = self.trainer.optimizers
        fresh = create_optimizer(self.optim_config, self.network)
        for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group.update({name: value for name, value in new.items() if name != "params"})

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        # Set here, from the step alone: a scheduler would have state of its own to restore.
        rate = self.learning_rate(self.trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._statistics is not None:
            self._statistics.step_ends()
        # Here and not at the batch's end: accumulated batches are one update.
        if self.average is not None and not self.skip_update:
            self.average.update(self.network)

    def train_results(self) -> dict[str, float]:
        """Each training metric since the last call, over all ranks."""
        results = {f"train_{name}": float(metric.compute()) for name, metric in _each(self.train_metrics)}
        for _, metric in _each(self.train_metrics):
            metric.reset()
        return results

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The window of training metrics since the last logged row, of each rank, so that a resumed run logs the same next
        # row: a sum over ranks would round in another order.
        window = {
            name: {state: torch.as_tensor(value).detach().cpu().clone() for state, value in metric.metric_state.items()}
            for name, metric in _each(self.train_metrics)
        }
        windows = [window]
        if self.trainer.world_size > 1:
            windows = [{} for _ in range(self.trainer.world_size)]
            dist.all_gather_object(windows, window)
        checkpoint["train_window"] = windows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        windows = checkpoint["train_window"]
        if len(windows) == (self._trainer.world_size if self._trainer is not None else 1):
            mine = windows[self.global_rank]
        elif self.global_rank == 0:  # another number of ranks: all that was counted, counted here; all states are sums
            mine = {
                name: {state: sum(window[name][state] for window in windows) for state in states}
                for name, states in windows[0].items()
            }
        else:
            return
        for name, metric in _each(self.train_metrics):
            metric.load_state_dict(mine[name], strict=False)


def _each(metrics: nn.ModuleDict) -> Iterator[tuple[str, Metric]]:
    for name, metric in metrics.items():
        assert isinstance(metric, Metric)
        yield name, metric


def _update(metrics: nn.ModuleDict, loss: Tensor, logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> None:
    """Adds a batch; a loss that does not count (`counts`, a bool scalar on the device) is left out of the mean."""
    for name, metric in _each(metrics):
        if name == "loss" and counts is not None:
            metric.update(torch.where(counts, loss, 0.0), weight=counts * len(labels))
        elif name == "loss":
            metric.update(loss, weight=len(labels))
        elif name == "images":
            metric.update(len(labels))
        else:
            metric.update(logits, labels)
