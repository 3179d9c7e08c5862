"""Training on the fused Triton kernels: an Xception whose blocks are computed by the parts of `kernels.parts`."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xception_pl.kernels import tiles
from xception_pl.nets.convs import SeparableConv2d
from xception_pl.nets.xception import Block, Stem, Xception

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable(network: Xception, device: torch.device) -> str | None:
    """Why a network cannot train on these kernels on a device, in a clause; None where it can."""
    blocks = network._blocks()
    if not isinstance(blocks[0], Stem) or not all(isinstance(block, Block) for block in blocks[1:]):
        return "blocks were removed from the network"
    for block in blocks[1:]:
        assert isinstance(block, Block)
        if block.dilation != 1 or block.pool_stride == 1:
            return "the fused kernels have no dilation, which output_stride below 32 needs"
        for i in range(1, block.depth + 1):
            conv = block.get_submodule(f"sepconv{i}")
            if not isinstance(conv, SeparableConv2d):
                return "the fused kernels know no segments other than one a channel"
            if not isinstance(conv.activation, nn.Identity):
                return "the fused kernels have no intermediate_activation"
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and torch.cuda.is_available():  # a plan may be made where there is none
        if torch.version.hip is not None:
            return "the fused kernels were made for NVIDIA's GPUs"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"the fused kernels need compute capability 8.0, and {tiles.card()} is older"
    return None


def unproven(network: Xception, device: torch.device) -> str | None:
    """Why `auto` does not take these kernels: `bench tune` has not found them right and faster on this card."""
    speedup = tiles.speedup()
    if speedup is None:
        return (
            "the fused kernels have not been timed on this card: `python -m xception_pl.bench tune` does, and "
            "model.kernels fused takes them untimed"
        )
    if speedup <= 1:
        return f"the fused kernels were measured at {speedup:.2f} × the plain layers' speed on this card"
    return None


def fuse(network: Xception) -> str:
    """Makes the network a FusedXception, in place: same parameters, buffers and names."""
    network.__class__ = FusedXception
    return "Triton kernels" + (f", {speed:.2f} × the plain layers here" if (speed := tiles.speedup()) else "")


class FusedXception(Xception):
    """An Xception that trains on fused kernels.

    `forward` gives what the plain network gives, within the precision. A stage falls back to the plain layers while
    any of its batch norms is in evaluation mode: in evaluation, and where layers are frozen. `forward_intermediates`
    is always plain. torch.compile leaves the features alone. Activations are kept in NHWC; other layouts are copied.

    Raises:
        ValueError: in float64, for which there are no kernels.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to the last feature map ``(B, num_features, H', W')``, channels_last."""
        if not self.training:
            return super().forward_features(x)
        kind = x.device.type
        mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype
        if dtype not in DTYPES:
            raise ValueError(f"the fused kernels compute in float32, float16 and bfloat16, not in {dtype}")
        blocks: list[Any]
        stem, block2, *others = self._blocks()
        stages = [[stem, block2], *([block] for block in others)]
        for blocks in stages:
            last = blocks[-1] is others[-1]
            norms = [module for block in blocks for module in block.modules() if hasattr(module, "running_var")]
            if all(norm.training for norm in norms):
                weights = list(chain.from_iterable(block.parameters() for block in blocks))
                x = x.to(dtype).permute(0, 2, 3, 1).contiguous()
                x = FusedStage.apply(blocks, last, x, *weights).permute(0, 3, 1, 2)
            else:
                for block in blocks:
                    x = block(x)
                x = F.relu(x) if last else x
        return x


class FusedStage(torch.autograd.Function):
    """One or two blocks as one step of the backward pass, so that DDP sends their gradients while others are made."""

    @staticmethod
    def forward(ctx: Any, blocks: list[Any], last: bool, x: Tensor, *weights: nn.Parameter) -> Tensor:
        from xception_pl.kernels.parts import Activation, BlockPart, StemPart  # imports Triton

        ctx.parts = [StemPart(b) if isinstance(b, Stem) else BlockPart(b, last=last) for b in blocks]
        ctx.weights = weights
        kept: list[Tensor | None] = []
        ctx.cuts = [0]
        value = Activation(x)
        for part in ctx.parts:
            value, saved = part.forward(value)
            kept += saved
            ctx.cuts.append(len(kept))
        ctx.save_for_backward(*kept)
        return value.y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        kept = ctx.saved_tensors
        grads: dict[Tensor, Tensor] = {}
        passed: Any = grad.contiguous()
        for part, start, end in reversed(list(zip(ctx.parts, ctx.cuts[:-1], ctx.cuts[1:], strict=True))):
            passed = part.backward(passed, kept[start:end], grads)
        return None, None, passed.dz, *(grads[weight].to(weight.dtype) for weight in ctx.weights)
