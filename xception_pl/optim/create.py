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

    With a `layer_decay` d below 1 each of the two is split by depth, as timm's `group_matcher` numbers it, and has the
    factor of its rate as `lr_scale`: 1 for the head, d for the block before it, then d², and so on to the stem.

    Returns:
        Groups for a `torch.optim.Optimizer`, named `l2` and `no_l2`, with the depth behind it where they are split.
        Each trainable parameter is in exactly one of them, once even if modules share it; frozen parameters are in
        none. The split does not depend on `l2`, so a run can be resumed with another strength.

    Raises:
        ValueError: if no parameter is trainable, or the network does not say how deep its layers are.
    """
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the network has no trainable parameter: every requires_grad is False, so unfreeze some")
    strength = 2.0 * config.l2 if config.l2_sense == "keras" else config.l2
    depths = _depths(network) if config.layer_decay < 1 else {}
    head = max(depths.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for kind, decay in (("l2", strength), ("no_l2", 0.0)):
        for name, parameter in trainable.items():
            if (config.l2_on == "all" or parameter.ndim >= 2) != (kind == "l2"):
                continue
            depth = depths.get(name, head)
            title = f"{kind}.{depth}" if depths else kind
            scale = config.layer_decay ** (head - depth)
            group = groups.setdefault(title, {"name": title, "params": [], "weight_decay": decay, "lr_scale": scale})
            group["params"].append(parameter)
    return list(groups.values())


def _depths(network: nn.Module) -> dict[str, int]:
    """The depth of each parameter, 0 at the input; of any network that timm can number."""
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ValueError("optim.layer_decay: nothing tells how deep the layers of this network are, so leave it at 1")
    from timm.models import group_parameters  # 2 s to import: only for those who ask for it

    depths: dict[str, int] = group_parameters(network, matcher(), reverse=True)
    return depths


def create_optimizer(config: OptimConfig, network: nn.Module) -> Optimizer:
    """The recipe's optimiser over the network's trainable parameters (Section 4.2).

    - `sgd`: `v = momentum * v + g; p -= lr * v`, the same in TensorFlow and PyTorch.
    - `rmsprop`: TensorFlow's, which PyTorch's is not. The mean square starts at 1, eps stands inside the root, and the
      momentum buffer holds the learning rate, so a later decay does not reach back:
      `ms = rho * ms + (1 - rho) * g**2; mom = momentum * mom + lr * g / sqrt(ms + eps); p -= mom`.

    The rate starts at `config.lr`; whoever trains sets each step's, `learning_rate` times the group's `lr_scale`.
    """
    groups = parameter_groups(network, config)
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    from timm.optim.rmsprop_tf import RMSpropTF  # timm takes a second to import: only for those who ask for it

    optimizer: Optimizer = RMSpropTF(groups, lr=config.lr, momentum=config.momentum, alpha=config.rho, eps=config.eps)
    return optimizer
