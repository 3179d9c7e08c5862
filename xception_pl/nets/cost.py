"""What a network costs, counted and not measured: no weights are read and no image is needed."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn


def parameters(network: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def macs(network: nn.Module, image: tuple[int, int, int]) -> int:
    """Multiply-accumulates of the convolutions and linear layers, for one image ``(channels, height, width)``."""
    network = deepcopy(network).to("meta").eval()
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += output.numel() * weight[0].numel()  # each output sums over one kernel

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.empty(1, *image, device="meta"))
    return total


def activation_bytes(network: nn.Module, image: tuple[int, int, int]) -> int:
    """Bytes that training keeps for the backward pass, for each image of a batch, in the network's own precision.

    Each tensor that autograd saves counts once, whatever saves it. Weights do not count, nor what does not grow with
    the batch.
    """
    network = deepcopy(network).to("meta").train()
    dtype = next(network.parameters()).dtype

    def kept(batch: int) -> int:
        return saved_bytes(lambda: network(torch.empty(batch, *image, dtype=dtype, device="meta")), network)

    return kept(3) - kept(2)


def saved_bytes(forward: Callable[[], Tensor], network: nn.Module) -> int:
    """Bytes that a forward pass saves for the backward pass, without the network's parameters and buffers."""
    weights = {tensor.untyped_storage()._cdata for tensor in network.state_dict().values()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    del output  # until here it kept the saved tensors, and so their addresses, alive
    return sum(sizes.values())
