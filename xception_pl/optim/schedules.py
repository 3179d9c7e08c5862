"""Learning rates: a pure function of the optimiser step: world size, accumulation and resuming cannot change them."""

import math
from dataclasses import replace

from xception_pl.optim.config import OptimConfig


def learning_rate(
    config: OptimConfig, step: int, *, images_per_epoch: int, global_batch: int, total_steps: int
) -> float:
    """Learning rate of one optimiser step.

    Warm-up comes first: over `W = int(images_per_epoch * warmup_epochs / global_batch)` steps the rate is
    `lr * (step + 1) / W`, so the last of them runs at `lr`. The schedule's own shape is counted from there,
    with `s = step - W`:

    - `staircase` by epochs: `lr * decay_rate ** floor(s / decay_steps)` with TF-Slim's
      `decay_steps = int(images_per_epoch * decay_every_epochs / global_batch)`: TensorFlow's `exponential_decay`
      (Section 4.2, ImageNet);
    - `staircase` by samples: the exponent is `floor(s * global_batch / decay_every_samples)`, in integers. Nothing is
      rounded to whole steps: the stairs fall where the images say (Section 4.2, JFT);
    - `cosine`: half a cosine from `lr` to `final_lr`, which is reached after the last of `total_steps`;
    - `constant`: `lr`.

    Where `lr_batch` is set all of it is multiplied by `global_batch / lr_batch`: the linear rule.

    The paper says neither whether its decay was a staircase nor that it had a warm-up.

    Args:
        config: the recipe's optimiser section, free of complaints from `check`.
        step: optimiser steps made so far; the first step is 0.
        images_per_epoch: training images.
        global_batch: images an optimiser step, over all devices and accumulated batches.
        total_steps: optimiser steps of the whole run (read by `cosine` alone).

    Raises:
        ValueError: if a stair is shorter than one optimiser step.
    """
    if config.lr_batch is not None:
        scale, config = global_batch / config.lr_batch, replace(config, lr_batch=None)
        config = replace(config, lr=config.lr * scale, final_lr=config.final_lr * scale)
    warmup_steps = int(images_per_epoch * config.warmup_epochs / global_batch)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    step -= warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = min(1.0, step / max(1, total_steps - warmup_steps))
        return config.final_lr + (config.lr - config.final_lr) * (1.0 + math.cos(math.pi * progress)) / 2.0
    if config.decay_every_samples:
        stairs = step * global_batch // config.decay_every_samples
    else:
        # Multiplied before it is divided, so that a whole number of steps is never rounded down to one less.
        decay_steps = int(images_per_epoch * config.decay_every_epochs / global_batch)
        if decay_steps == 0:
            raise ValueError(
                f"optim.decay_every_epochs {config.decay_every_epochs} of {images_per_epoch} images is less than one "
                f"optimiser step of {global_batch} images (data.global_batch): raise the one or lower the other"
            )
        stairs = step // decay_steps
    return config.lr * config.decay_rate**stairs
