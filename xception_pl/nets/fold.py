"""Batch normalisation folded into the convolutions before it: the same outputs in evaluation, from fewer operations."""

from copy import deepcopy

import torch
from torch import nn

from xception_pl.nets.xception import Block, Stem, Xception


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy of an Xception in which every batch norm has become the weight and bias of the convolution before it.

    For evaluation only: the statistics are fixed. The state dict is no longer that of an Xception. The arithmetic is in
    float64, so that what is left of a difference is the rounding of the forward pass.

    Args:
        network: stays as it is; whether it trains does not matter.

    Raises:
        ValueError: the network is no :class:`~xception_pl.nets.xception.Xception`, or folded already.
    """
    if not isinstance(network, Xception):
        raise ValueError(f"only an Xception can be folded, not {type(network).__name__}")
    folded = deepcopy(network).eval()
    for block in folded.modules():
        if isinstance(block, Stem):
            pairs = [("conv1", "bn1"), ("conv2", "bn2")]
        elif isinstance(block, Block):
            pairs = [(f"sepconv{i}.pointwise", f"bn{i}") for i in range(1, block.depth + 1)]
            pairs += [("shortcut", "shortcut_bn")] * (block.shortcut is not None)
        else:
            continue
        for conv, norm in pairs:
            _fold(block, conv, norm)
    return folded


@torch.no_grad()
def _fold(block: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = block.get_submodule(conv_name), block.get_submodule(norm_name)
    if not isinstance(norm, nn.BatchNorm2d):
        raise ValueError("this network's batch norm is folded already: fold the one it was made from")
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * scale
    dtype, requires_grad = conv.weight.dtype, conv.weight.requires_grad
    conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=requires_grad)
    block.set_submodule(norm_name, nn.Identity())
