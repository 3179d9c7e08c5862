"""A network for inference on the processor: batch norms folded, a separable convolution in one pass over memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception_pl.kernels import cpu_layers as layers
from xception_pl.nets.convs import SeparableConv2d
from xception_pl.nets.xception import Block, Stem, Xception

Step = Callable[[Tensor], Tensor]


class FastInference:
    """Images (B, C, H, W) to logits, as `network` gives them in evaluation mode, to float32's rounding.

    Attributes:
        path: which way it computes and why, as a sentence without a full stop.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.steps: list[Step] | None = None
        problem = layers.unfit(network)
        if problem is None:
            assert isinstance(network, Xception)
            self.steps = [_step(block) for block in network.children() if isinstance(block, Stem | Block)]
            self.path = "fused: cpu.c, batch norms folded"
        else:
            self.path = f"torch: {problem}"

    def __call__(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    @torch.inference_mode()
    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last feature maps (B, F, h, w), as the network's own method gives them."""
        if self.network.training:
            self.network.eval()
        x = images.to(next(self.network.parameters()).dtype).contiguous(memory_format=torch.channels_last)
        if self.steps is None or min(x.shape) < 1 or min(x.shape[2:]) < 7:
            maps: Tensor = self.network.forward_features(x)  # type: ignore[operator]
            return maps
        for step in self.steps:
            x = step(x)
        return F.relu(x)

    @torch.inference_mode()
    def forward_head(self, maps: Tensor) -> Tensor:
        """Feature maps to logits (B, classes)."""
        logits: Tensor = self.network.forward_head(maps)  # type: ignore[operator]
        return logits


def fast_inference(network: nn.Module) -> FastInference:
    """A callable that gives what `network` gives in evaluation mode, as fast as this machine can.

    On a processor with AVX2 and a C compiler an :class:`~xception_pl.nets.xception.Xception` takes kernels of its own,
    which are compiled on first use in seconds and kept; each block whose options they do not know, every other network
    and every other device takes torch's path. `path` of the result says which and why.

    The weights are those of this moment: call it again after they have changed. The network is put into evaluation
    mode, and needs to stay where it is.
    """
    network.eval()
    return FastInference(network)


def _step(block: Stem | Block) -> Step:
    if isinstance(block, Stem):
        return _stem(block)
    return _block(block) if layers.knows(block) else block


def _stem(stem: Stem) -> Step:
    weights = [layers.packed(layers.matrix(conv.weight).t()) for conv in (stem.conv1, stem.conv2)]
    norms = [layers.folded(norm, floor=0.0) for norm in (stem.bn1, stem.bn2)]

    def run(x: Tensor) -> Tensor:
        x = layers.product(layers.patches(x, stride=2), weights[0], norms[0])
        return layers.product(layers.patches(x), weights[1], norms[1])

    return run


def _block(block: Block) -> Step:
    separables = [block.get_submodule(f"sepconv{i}") for i in range(1, block.depth + 1)]
    taps, weights = [], []
    for separable in separables:
        assert isinstance(separable, SeparableConv2d)
        taps.append(layers.taps(separable.depthwise.weight))
        weights.append(layers.packed(layers.matrix(separable.pointwise.weight).t()))
    # The ReLU before the next layer is done where the batch norm is; the last layer's belongs to the next block.
    norms = [
        layers.folded(block.get_submodule(f"bn{i}"), layers.NO_FLOOR if i == block.depth else 0.0)
        for i in range(1, block.depth + 1)
    ]
    first = layers.RELU if block.relu_first else layers.NOTHING
    shortcut = None
    if block.shortcut is not None:
        assert isinstance(block.shortcut, nn.Conv2d)
        shortcut = layers.packed(layers.matrix(block.shortcut.weight).t()), layers.folded(block.shortcut_bn)

    def run(inputs: Tensor) -> Tensor:
        x = inputs
        identity = block.has_shortcut and shortcut is None
        for i in range(block.depth):
            left = layers.depthwise(x, taps[i], layers.NOTHING if i else first, block.dilation)
            x = layers.product(left, weights[i], norms[i], inputs if identity and i == block.depth - 1 else None)
        if block.pool_stride is None:
            return x
        added = None
        if shortcut is not None:
            added = layers.product(layers.points(inputs, stride=block.pool_stride), *shortcut)
        return layers.pool(x, block.pool_stride, block.dilation, added=added)

    return run
