"""The training path of the processor: a block's forward and backward pass through cpu.c.

Between the layers of a block only the outputs of the pointwise convolutions are kept. Their batch norm and ReLU are
applied again wherever they are read, so that neither those, nor the depthwise outputs, nor the indices of the pooling
are ever in memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xception_pl.kernels import cpu_layers as layers
from xception_pl.kernels.cpu_layers import NO_FLOOR, NOTHING, RELU, Affine, Behind
from xception_pl.nets.xception import Block, Stem, Xception


def unavailable(network: Xception, device: torch.device) -> str | None:
    """Why this network cannot take the path; None where it can."""
    problem = layers.unfit(network)
    if problem is None and not any(isinstance(b, Block) and layers.knows(b) for b in network.children()):
        problem = (
            "the kernels for the processor know separable convolutions with nothing between their two halves alone"
        )
    return problem


WIDE = 1024
"""Features of a network that is half as wide as Figure 5's."""


def unproven(network: Xception, device: torch.device) -> str | None:
    """Why `auto` leaves the path."""
    if not layers.measured():
        return "the kernels for the processor were measured with AVX2 alone"
    if network.num_features < WIDE:  # their calls cost more than memory saves: docs/performance_cpu.md
        return "the kernels for the processor are faster from half the paper's width on"
    return None


def fuse(network: Xception) -> str:
    """Switches the network, in place, to the path."""
    for block in network.children():
        if isinstance(block, Stem):
            block.__class__ = FusedStem
        elif isinstance(block, Block) and layers.knows(block):
            block.__class__ = FusedBlock
    return "cpu.c, one pass over memory a layer"


class FusedStem(Stem):
    """The stem, trained by cpu.c."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fusible(self, x) or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        parameters = [p for n in ("1", "2") for m in ("conv", "bn") for p in getattr(self, m + n).parameters()]
        out: Tensor = _StemFunction.apply(x.contiguous(memory_format=torch.channels_last), self, *parameters)
        return out


class FusedBlock(Block):
    """A block, trained by cpu.c."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not _fusible(self, inputs):
            return super().forward(inputs)
        parameters = list(self.parameters())
        out: Tensor = _BlockFunction.apply(inputs.contiguous(memory_format=torch.channels_last), self, *parameters)
        return out


def _fusible(block: nn.Module, x: Tensor) -> bool:
    """Whether cpu.c can take this call: float32 on the processor, with the statistics of the batch."""
    return (
        block.training
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and all(
            m.training and m.track_running_stats and m.momentum is not None
            for m in block.modules()
            if isinstance(m, nn.BatchNorm2d)
        )
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in block.parameters())
    )


class _Norm:
    """A batch norm of one training step, and its map of the kept values."""

    def __init__(self, norm: nn.Module, mean: Tensor, variance: Tensor, count: int, floor: float) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        if count == 1:
            raise ValueError("batch norm needs more than one value a channel to train: use a larger batch or image")
        self.count, self.mean = count, mean
        self.inverse = (variance.double() + norm.eps).rsqrt()
        scale = norm.weight.double() * self.inverse
        self.affine = Affine(scale.float(), (norm.bias.double() - mean.double() * scale).float(), floor)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)

    def behind(self, sums: Tensor) -> tuple[Behind, Tensor, Tensor]:
        """From the sums of the gradient: that of the input, of the weight and of the bias."""
        total, product = sums.double()
        scale = self.affine.scale
        assert scale is not None
        slope = -(scale * self.inverse.square() * product / self.count).float()
        behind = Behind(scale, -(scale * total / self.count).float(), self.mean, slope)
        return behind, (product * self.inverse).float(), sums[0]


def _convolve(left: layers.Left, weight: Tensor, norm: nn.Module, floor: float) -> tuple[Tensor, _Norm]:
    """A product with a weight (N, depth), and the batch norm after it."""
    out, mean, variance = layers.product_and_moments(left, layers.packed(weight.t()))
    return out, _Norm(norm, mean, variance, out.numel() // out.shape[1], floor)


def _like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in its parameter's shape and memory layout, as autograd and DDP want it."""
    if parameter.shape[2:] == (1, 1):
        return gradient.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(gradient)


class _BlockFunction(torch.autograd.Function):
    """A :class:`Block`: its input and its parameters, in their order, to its output."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, block: Block, *parameters: Tensor) -> Tensor:
        maps, norms, x = [], [], inputs
        affine = RELU if block.relu_first else NOTHING
        for i in range(block.depth):
            depthwise, pointwise = parameters[4 * i : 4 * i + 2]
            left = layers.depthwise(x, layers.taps(depthwise), affine, block.dilation)
            floor = NO_FLOOR if i == block.depth - 1 else 0.0
            x, norm = _convolve(left, pointwise.flatten(1), block.get_submodule(f"bn{i + 1}"), floor)
            maps.append(x)
            norms.append(norm)
            affine = norm.affine
        added, added_affine = (inputs if block.has_shortcut else None), NOTHING
        if block.shortcut is not None:
            assert block.pool_stride is not None
            left = layers.points(inputs, stride=block.pool_stride)
            added, norm = _convolve(left, parameters[-3].flatten(1), block.shortcut_bn, NO_FLOOR)
            maps.append(added)
            norms.append(norm)
            added_affine = norm.affine
        ctx.save_for_backward(inputs, *maps, *parameters)
        ctx.block, ctx.norms = block, norms
        if block.pool_stride is None:
            return layers.affine_map(x, affine, added)
        return layers.pool(x, block.pool_stride, block.dilation, affine, added, added_affine)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        norms: list[_Norm] = ctx.norms
        inputs, *saved = ctx.saved_tensors
        maps, parameters = saved[: len(norms)], saved[len(norms) :]
        needed = ctx.needs_input_grad[2:]
        gradients: list[Tensor | None] = [None] * len(parameters)
        g = added = g.contiguous(memory_format=torch.channels_last)
        depth = block.depth
        if block.pool_stride is None:
            _, sums = layers.norm_sums(g, maps[depth - 1], norms[depth - 1].mean)
        else:
            how = block.pool_stride, block.dilation, norms[depth - 1].affine, norms[depth - 1].mean
            g, sums = layers.pool_backward(g, maps[depth - 1], *how)
        stride = 1
        if block.shortcut is not None:
            assert block.pool_stride is not None
            stride, norm = block.pool_stride, norms[depth]
            _, shortcut_sums = layers.norm_sums(added, maps[depth], norm.mean)
            behind, gradients[-2], gradients[-1] = norm.behind(shortcut_sums)
            gradient = layers.gradient(added, maps[depth], behind)
            if needed[-3]:
                weight_gradient = layers.weight_gradient(layers.points(inputs, stride=stride), gradient)
                gradients[-3] = _like(parameters[-3], weight_gradient)
            added = layers.product(gradient, layers.packed(parameters[-3].flatten(1)))
        for i in reversed(range(depth)):
            depthwise, pointwise = parameters[4 * i : 4 * i + 2]
            before = norms[i - 1].affine if i else RELU if block.relu_first else NOTHING
            left = layers.depthwise(maps[i - 1] if i else inputs, layers.taps(depthwise), before, block.dilation)
            behind, gradients[4 * i + 2], gradients[4 * i + 3] = norms[i].behind(sums)
            gradient = layers.gradient(g, maps[i], behind)
            if needed[4 * i + 1]:
                gradients[4 * i + 1] = _like(pointwise, layers.weight_gradient(left, gradient))
            g = layers.product(gradient, layers.packed(pointwise.flatten(1)))
            if i:
                g, taps, sums = layers.depthwise_backward(left, g, norms[i - 1].mean)
            else:
                g, taps, _ = layers.depthwise_backward(left, g, None, added if block.has_shortcut else None, stride)
            gradients[4 * i] = _like(depthwise, taps.t().reshape(depthwise.shape))
        return (g, None, *gradients)


class _StemFunction(torch.autograd.Function):
    """A :class:`Stem`: images, which get no gradient, and its parameters, in their order, to its output."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, stem: Stem, *parameters: Tensor) -> Tensor:
        first, norm1 = _convolve(layers.patches(images, stride=2), layers.matrix(parameters[0]), stem.bn1, floor=0.0)
        second, norm2 = _convolve(layers.patches(first, norm1.affine), layers.matrix(parameters[3]), stem.bn2, 0.0)
        ctx.save_for_backward(images, first, second, *parameters)
        ctx.norms = norm1, norm2
        return layers.affine_map(second, norm2.affine)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        images, first, second, *parameters = ctx.saved_tensors
        norm1, norm2 = ctx.norms
        weight1, weight2 = parameters[0], parameters[3]
        g = g.contiguous(memory_format=torch.channels_last)
        g, sums = layers.norm_sums(g, second, norm2.mean, norm2.affine)
        behind, norm2_weight, norm2_bias = norm2.behind(sums)
        gradient = layers.gradient(g, second, behind)
        gradient2 = layers.weight_gradient(layers.patches(first, norm1.affine), gradient)
        # Behind the second convolution: its transpose is a convolution with the kernel turned around.
        turned = weight2.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, weight2.shape[1])
        g = layers.product(layers.patches(layers.gradient_map(gradient), padding=2), layers.packed(turned))
        g, sums = layers.norm_sums(g, first, norm1.mean, norm1.affine)
        behind, norm1_weight, norm1_bias = norm1.behind(sums)
        gradient1 = layers.weight_gradient(layers.patches(images, stride=2), layers.gradient(g, first, behind))
        return (
            None,
            None,
            _like(weight1, _kernel(gradient1, weight1)),
            norm1_weight,
            norm1_bias,
            _like(weight2, _kernel(gradient2, weight2)),
            norm2_weight,
            norm2_bias,
        )


def _kernel(gradient: Tensor, weight: Tensor) -> Tensor:
    """A matrix (N, k · k · C) as a kernel (N, C, k, k)."""
    outputs, inputs, height, width = weight.shape
    return gradient.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2)
