"""What of a network stays as it was loaded while the rest is fine-tuned."""

from torch import nn


def freeze(network: nn.Module, blocks: int = 0, *, statistics: bool = False) -> list[nn.Module]:
    """Takes blocks out of training, and all batch normalisation's statistics where `statistics` says so.

    A frozen block has no gradients **and** is in evaluation mode. The mode is the part that is easily missed: batch
    normalisation in training mode normalises by the batch and moves its running statistics whether or not its scale and
    offset are trained, so "frozen" blocks would give other features than those they were trained to give, and worse
    ones the longer they are fine-tuned on few images.

    `statistics` alone leaves scales and offsets to be trained and keeps the means and variances of the loaded weights:
    for batches too small to estimate them.

    Args:
        network: changed in place.
        blocks: how many of Xception's blocks, from the input on: 14 leaves only the head of the paper's network.
        statistics: whether every batch normalisation keeps its running statistics and normalises by them.

    Returns:
        The modules to be in evaluation mode whenever the network is put into training mode: whoever calls `train()`
        calls `eval()` on these.

    Raises:
        ValueError: the network has fewer blocks.
    """
    found = [network.get_submodule(f"block{number}") for number in range(1, 1 + blocks) if _has_block(network, number)]
    if len(found) < blocks:
        raise ValueError(f"model.freeze {blocks}: the network has {len(found)} blocks to freeze, so use that or less")
    for block in found:
        block.requires_grad_(False)
    held = list(found)
    if statistics:
        held += [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in held:
        module.eval()
    return held


def _has_block(network: nn.Module, number: int) -> bool:
    return hasattr(network, f"block{number}")
