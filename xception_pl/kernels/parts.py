"""The parts of Xception in training, forward and backward, on the fused kernels of `ops`.

What a part keeps for its backward pass is what comes out of its convolutions, before batch norm: one tensor a layer
where the plain path keeps four. What follows from it, normalised, activated and depthwise-convolved values, is computed
again where it is read. All activations are NHWC, (B, H, W, C), contiguous, in the precision of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xception_pl.kernels.ops import normalise
from xception_pl.kernels.ops.depthwise import depthwise, depthwise_backward
from xception_pl.kernels.ops.join import pool, pool_backward
from xception_pl.kernels.ops.pointwise import pointwise, pointwise_input, pointwise_weight
from xception_pl.nets.xception import Block, Stem


@dataclass
class Activation:
    """A tensor as the next part reads it: ReLU(y · scale + shift) by the table, or y itself without one."""

    y: Tensor
    table: Tensor | None = None


@dataclass
class Gradient:
    """The gradient of an Activation before its ReLU (without a table, of y), and batch norm's partial sums of it."""

    dz: Tensor
    sums: Tensor


Grads = dict[Tensor, Tensor]
"""What a backward pass found, in float32, by parameter."""


class StemPart:
    """Block 1. Its convolutions are cuDNN's: with 3 and 32 input channels they are neither depthwise nor 1 × 1."""

    def __init__(self, stem: Stem) -> None:
        self.stem = stem
        self.norms = [stem.bn1, stem.bn2]

    def forward(self, images: Activation) -> tuple[Activation, tuple[Any, ...]]:
        y1 = _convolve(images.y, self.stem.conv1)
        table1 = normalise.finish(normalise.statistics(y1), self.stem.bn1)
        y2 = _convolve(normalise.apply(y1, table1, relu=True), self.stem.conv2)
        table2 = normalise.finish(normalise.statistics(y2), self.stem.bn2)
        return Activation(y2, table2), (images.y, y1, table1, y2, table2)

    def backward(self, gradient: Gradient, saved: tuple[Any, ...], grads: Grads) -> Gradient:
        images, y1, table1, y2, table2 = saved
        stem = self.stem
        dy2 = normalise.gradient(gradient.dz, y2, _norm_backward(gradient.sums, table2, stem.bn2, grads))
        a1 = normalise.apply(y1, table1, relu=True)
        da1 = _convolve_backward(dy2, a1, stem.conv2, grads)
        dz1, sums = normalise.sums(da1, y1, table1, relu=True)
        dy1 = normalise.gradient(dz1, y1, _norm_backward(sums, table1, stem.bn1, grads))
        return Gradient(_convolve_backward(dy1, images, stem.conv1, grads), sums)


class BlockPart:
    """Blocks 2 to 14: separable convolutions with batch norm, the pooling or the sum at the end, and the shortcut.

    Where the first convolution at least doubles the channels of a pooling block, its output is not kept but computed
    again in the backward pass: from the smaller input that costs little, and these tensors are the largest there are.

    Args:
        block: one of the network's.
        last: whether what follows is a ReLU and nothing else.
    """

    def __init__(self, block: Block, *, last: bool = False) -> None:
        self.block: Any = block
        self.last = last
        self.convs: list[Any] = [block.get_submodule(f"sepconv{i}") for i in range(1, block.depth + 1)]
        self.norms: list[Any] = [block.get_submodule(f"bn{i}") for i in range(1, block.depth + 1)]
        self.side_norm: Any = block.shortcut_bn if block.shortcut is not None else None
        first = self.convs[0].pointwise.weight
        self.again = block.pool_stride is not None and first.shape[0] >= 2 * first.shape[1]

    def forward(self, x: Activation) -> tuple[Activation, tuple[Any, ...]]:
        ys: list[Tensor] = []
        tables: list[Tensor] = []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y, partial = pointwise(self._depthwise(i, x, ys, tables), conv.pointwise.weight)
            ys.append(y)
            tables.append(normalise.finish(partial, norm))
        side_table = None
        if self.block.pool_stride is not None:
            side = None
            if self.side_norm is not None:
                side, partial = self._side(x, statistics=True)
                side_table = normalise.finish(partial, self.side_norm)
            out = pool(ys[-1], tables[-1], side, side_table)
        elif self.last:
            out = normalise.apply(ys[-1], tables[-1], relu=True)
        else:
            out = normalise.apply(ys[-1], tables[-1], residual=x.y if self.block.has_shortcut else None)
        kept = ys[1:] if self.again else ys
        return Activation(out), (x.y, x.table, side_table, *kept, *tables)

    def backward(self, grad: Tensor, saved: tuple[Any, ...], grads: Grads) -> Gradient:
        """From the gradient of the output to that of the input; those of the parameters go to `grads`."""
        depth, block = len(self.convs), self.block
        x, side_table = Activation(*saved[:2]), saved[2]
        ys, tables = list(saved[3:-depth]), list(saved[-depth:])
        first_out = None
        if self.again:
            first_out = self._depthwise(0, x, [], [])
            y, _ = pointwise(first_out, self.convs[0].pointwise.weight, statistics=False)
            ys.insert(0, y)
        add = None
        if block.pool_stride is not None:
            side = None
            if self.side_norm is not None:
                side, _ = self._side(x, statistics=False)
            dz, sums, side_sums = pool_backward(grad, ys[-1], tables[-1], side, side_table)
            if side is not None:
                add = self._side_backward(grad, side, side_table, side_sums, x, grads)
        else:
            dz, sums = normalise.sums(grad, ys[-1], tables[-1], relu=self.last)
            add = grad if block.has_shortcut else None
        for i in reversed(range(depth)):
            conv = self.convs[i]
            table = _norm_backward(sums, tables[i], self.norms[i], grads)
            d_out, dy = pointwise_input(dz, ys[i], table, conv.pointwise.weight)
            source = Activation(ys[i - 1], tables[i - 1]) if i else x
            again = i > 0 or first_out is None
            dz, sums, grads[conv.depthwise.weight], out = depthwise_backward(
                d_out, source.y, source.table, conv.depthwise.weight,
                relu=self._relu(i, x), again=again,
                add=None if i else add, add_masked=i == 0 and x.table is not None,
            )  # fmt: skip
            grads[conv.pointwise.weight] = pointwise_weight(dy, out if again else first_out)
        return Gradient(dz, sums)

    def _relu(self, i: int, x: Activation) -> bool:
        """Whether a ReLU precedes convolution `i`: the block's own, or the one that its input comes with."""
        return i > 0 or self.block.relu_first or x.table is not None

    def _depthwise(self, i: int, x: Activation, ys: list[Tensor], tables: list[Tensor]) -> Tensor:
        source = Activation(ys[i - 1], tables[i - 1]) if i else x
        return depthwise(source.y, source.table, self.convs[i].depthwise.weight, relu=self._relu(i, x))

    def _side(self, x: Activation, *, statistics: bool) -> tuple[Tensor, Tensor]:
        return pointwise(x.y, self.block.shortcut.weight, table=x.table, stride=2, statistics=statistics)

    def _side_backward(
        self, grad: Tensor, side: Tensor, table: Tensor, sums: Tensor, x: Activation, grads: Grads
    ) -> Tensor:
        weight: Tensor = self.block.shortcut.weight
        add, dy = pointwise_input(grad, side, _norm_backward(sums, table, self.side_norm, grads), weight)
        grads[weight] = pointwise_weight(dy, x.y, table=x.table, stride=2)
        return add


def _norm_backward(sums: Tensor, table: Tensor, norm: Any, grads: Grads) -> Tensor:
    """The backward table; the gradients of scale and offset go to `grads`."""
    out, grads[norm.weight], grads[norm.bias] = normalise.gradient_table(sums, table, norm)
    return out


def _convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """An ordinary convolution, NHWC to NHWC."""
    y = torch.conv2d(x.permute(0, 3, 1, 2), conv.weight.detach().to(x.dtype), None, conv.stride, conv.padding)
    return y.permute(0, 2, 3, 1).contiguous()


def _convolve_backward(dy: Tensor, x: Tensor, conv: nn.Conv2d, grads: Grads) -> Tensor:
    """Gradient of an ordinary convolution's input; that of its weight goes to `grads`."""
    dx: Tensor
    dx, d_weight, _ = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), conv.weight.detach().to(x.dtype), None,
        conv.stride, conv.padding, [1, 1], False, [0, 0], 1, [True, True, False],
    )  # fmt: skip
    grads[conv.weight] = d_weight.float()
    return dx.permute(0, 2, 3, 1).contiguous()
