"""From the recipe to a torch optimiser: which parameters L2 touches, and in whose sense."""

from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from xception_pl.optim.config import OptimConfig


def parameter_groups(network: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that L2 shrinks and those that it leaves alone.

    `l2_on: kernels` means every parameter with two axes or more: the kernels of convolutions (depthwise and pointwise
    ones included) and of dense layers; biases and batch norm's scales and offsets have one. `all` means all. The paper
    does not say which it did.

    The returned `weight_decay` w adds `w * parameter` to the gradient. A penalty of `l2/2 * sum(p**2)`, PyTorch's and
    TF-Slim's, is w = l2; Keras' `l2 * sum(p**2)` is w = 2 * l2.

    Returns:
        One or two groups for a `torch.optim.Optimizer`, named `l2` and `no_l2`. Each trainable parameter is in exactly
        one of them, once even if modules share it; frozen parameters are in none. The split does not depend on `l2`,
        so a run can be resumed with another strength.

    Raises:
        ValueError: if no parameter is trainable.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the network has no trainable parameter: every requires_grad is False, so unfreeze some")
    shrunk = [p for p in trainable if config.l2_on == "all" or p.ndim >= 2]
    left = [p for p in trainable if config.l2_on != "all" and p.ndim < 2]
    strength = 2.0 * config.l2 if config.l2_sense == "keras" else config.l2
    groups = [
        {"name": "l2", "params": shrunk, "weight_decay": strength},
        {"name": "no_l2", "params": left, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_optimizer(config: OptimConfig, network: nn.Module) -> Optimizer:
    """The recipe's optimiser over the network's trainable parameters (Section 4.2).

    - `sgd`: `v = momentum * v + g; p -= lr * v`, the same in TensorFlow and PyTorch.
    - `rmsprop`: TensorFlow's, which PyTorch's is not. The mean square starts at 1, eps stands inside the root, and the
      momentum buffer holds the learning rate, so a later decay does not reach back:
      `ms = rho * ms + (1 - rho) * g**2; mom = momentum * mom + lr * g / sqrt(ms + eps); p -= mom`.

    The rate starts at `config.lr`; whoever trains sets each step's, from `learning_rate`.
    """
    groups = parameter_groups(network, config)
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    from timm.optim.rmsprop_tf import RMSpropTF  # timm takes a second to import: only for those who ask for it

    optimizer: Optimizer = RMSpropTF(groups, lr=config.lr, momentum=config.momentum, alpha=config.rho, eps=config.eps)
    return optimizer
