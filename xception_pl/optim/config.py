"""What a recipe may say about the optimiser. Imports no torch."""

from dataclasses import dataclass
from math import inf
from typing import Literal

Loss = Literal["cross_entropy", "sigmoid"]


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser, schedule, L2, loss and weight averaging. Defaults are the paper's for ImageNet (sections 4.2 and 4.3)."""

    name: Literal["sgd", "rmsprop"] = "sgd"
    """Optimiser; `rmsprop` has TensorFlow's semantics."""
    lr: float = 0.045
    """Learning rate at the start, for the recipe's global batch, or that of lr_batch."""
    lr_batch: int | None = None
    """Global batch that lr and final_lr are meant for: another one scales them in proportion (linear rule); null does not."""
    layer_decay: float = 1.0
    """Factor on the rate from each block to the one before it: the head learns with lr, the last block with layer_decay
    times it, the one before with its square; for fine-tuning."""
    momentum: float = 0.9
    """Momentum of either optimiser."""
    nesterov: bool = False
    """Nesterov momentum (sgd only)."""
    rho: float = 0.9
    """Decay of the mean square (rmsprop only)."""
    eps: float = 1.0
    """Added to the mean square inside the root (rmsprop only)."""
    l2: float = 1.0e-5
    """Strength of the L2 penalty."""
    l2_sense: Literal["torch", "keras"] = "torch"
    """`torch`: l2/2 times the sum of squares, gradient l2*w (TF-Slim's too). `keras`: l2 times it, gradient 2*l2*w."""
    l2_on: Literal["kernels", "all"] = "kernels"
    """`kernels`: convolution and dense kernels. `all`: biases and batch norm too."""
    schedule: Literal["staircase", "cosine", "constant"] = "staircase"
    """Shape of the learning rate after warm-up."""
    decay_rate: float = 0.94
    """Factor of each stair (staircase only)."""
    decay_every_epochs: float = 2.0
    """Epochs a stair (staircase only); 0 when decay_every_samples counts instead."""
    decay_every_samples: int = 0
    """Training images a stair (staircase only), for JFT 3,000,000; 0 when decay_every_epochs counts instead."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises linearly to lr; the schedule is counted from there."""
    final_lr: float = 0.0
    """Learning rate reached after the last step (cosine only)."""
    loss: Loss = "cross_entropy"
    """`cross_entropy` for one label an image, `sigmoid` for label lists, summed over classes (Section 4.1, JFT)."""
    label_smoothing: float = 0.0
    """Probability mass spread evenly over the classes (cross_entropy only)."""
    ema_decay: float = 0.9999
    """Polyak averaging: its decay, early on TensorFlow's (1+n)/(10+n) if that is less; 0 switches it off."""


def check(config: OptimConfig) -> list[str]:
    """What is wrong with these settings: one sentence each, naming the keys; an empty list if nothing is.

    A key that has no effect beside the others counts as wrong if it was changed from its default.
    """
    wrong: list[str] = []

    def must(key: str, holds: bool, rule: str) -> None:
        if not holds:
            wrong.append(f"optim.{key} is {getattr(config, key)}, but must be {rule}.")

    # Written so that NaN, which compares false, is wrong everywhere.
    must("lr", 0 < config.lr < inf, "a finite number above 0")
    must("lr_batch", config.lr_batch is None or config.lr_batch > 0, "above 0, or null")
    must("layer_decay", 0 < config.layer_decay <= 1, "above 0 and at most 1")
    must("momentum", 0 <= config.momentum < 1, "at least 0 and less than 1")
    must("rho", 0 <= config.rho < 1, "at least 0 and less than 1")
    must("eps", 0 < config.eps < inf, "a finite number above 0")
    must("l2", 0 <= config.l2 < inf, "a finite number, 0 or above")
    must("decay_rate", 0 < config.decay_rate <= 1, "above 0 and at most 1")
    must("decay_every_epochs", 0 <= config.decay_every_epochs < inf, "a finite number, 0 or above")
    must("decay_every_samples", config.decay_every_samples >= 0, "0 or above")
    must("warmup_epochs", 0 <= config.warmup_epochs < inf, "a finite number, 0 or above")
    must("final_lr", 0 <= config.final_lr < inf, "a finite number, 0 or above")
    must("label_smoothing", 0 <= config.label_smoothing < 1, "at least 0 and less than 1")
    must("ema_decay", 0 <= config.ema_decay < 1, "at least 0 and less than 1")

    def without_effect(keys: str, owner: str, needed: str) -> None:
        for key in keys.split():
            value, default = getattr(config, key), getattr(OptimConfig, key)
            if value != default:
                wrong.append(
                    f"optim.{key} is {value}, but has no effect with optim.{owner} {getattr(config, owner)}: "
                    f"leave it at {default} or set optim.{owner} to {needed}."
                )

    if config.name != "rmsprop":
        without_effect("rho eps", "name", "rmsprop")
    if config.name != "sgd":
        without_effect("nesterov", "name", "sgd")
    if config.nesterov and config.name == "sgd" and config.momentum == 0:
        wrong.append("optim.nesterov is on, but optim.momentum is 0: give it a momentum or switch nesterov off.")
    if config.schedule != "staircase":
        without_effect("decay_rate decay_every_epochs decay_every_samples", "schedule", "staircase")
    elif config.decay_every_epochs and config.decay_every_samples:
        wrong.append(
            f"optim.decay_every_epochs is {config.decay_every_epochs} and optim.decay_every_samples is "
            f"{config.decay_every_samples}: a stair has one length, so set one of them to 0."
        )
    elif not config.decay_every_epochs and not config.decay_every_samples:
        wrong.append("optim.decay_every_epochs and optim.decay_every_samples are both 0: set one of them.")
    if config.schedule != "cosine":
        without_effect("final_lr", "schedule", "cosine")
    elif config.final_lr > config.lr:
        wrong.append(f"optim.final_lr is {config.final_lr}, but must be at most optim.lr, {config.lr}.")
    if config.loss != "cross_entropy":
        without_effect("label_smoothing", "loss", "cross_entropy")
    return wrong
