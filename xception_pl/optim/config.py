"""What a recipe may say about the optimiser. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser, learning-rate schedule, L2, loss and weight averaging. Defaults are the paper's for ImageNet (section 4.3)."""

    name: Literal["sgd", "rmsprop"] = "sgd"
    """Optimiser; `rmsprop` has TensorFlow's semantics."""
    lr: float = 0.045
    """Learning rate at the start, for the recipe's global batch."""
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
    """`torch`: l2/2 times the sum of squares, gradient l2*w (also TF-Slim's). `keras`: l2 times the sum, gradient 2*l2*w."""
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
    """Epochs over which the rate rises linearly to lr."""
    final_lr: float = 0.0
    """Learning rate at the end (cosine only)."""
    loss: Literal["cross_entropy", "sigmoid"] = "cross_entropy"
    """`cross_entropy` for one label an image, `sigmoid` for label lists (section 4.1, JFT)."""
    label_smoothing: float = 0.0
    """Probability mass spread evenly over the classes (cross_entropy only)."""
    ema_decay: float = 0.9999
    """Polyak averaging: decay of the averaged weights, with TensorFlow's min(decay, (1+n)/(10+n)); 0 switches it off."""
