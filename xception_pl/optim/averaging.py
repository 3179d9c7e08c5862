"""Polyak averaging, as TensorFlow's ExponentialMovingAverage: the weights that the paper evaluates (Section 4.2)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def polyak_decay(decay: float, updates: int) -> float:
    """TensorFlow's decay with `num_updates`: `min(decay, (1 + n) / (10 + n))`, so that early averages follow quickly.

    Args:
        decay: the decay that it grows towards, in [0, 1).
        updates: averages taken before this one, n; the first is 0 and has decay 0.1.
    """
    return min(decay, (1 + updates) / (10 + updates))


class PolyakAverage(nn.Module):
    """A frozen copy of a network whose weights follow the original's as an exponential moving average.

    `update` does `shadow -= (1 - d) * (shadow - value)` with `d = polyak_decay(decay, updates)` for every parameter and
    every floating-point buffer: batch norm's running statistics are averaged too, as TensorFlow's research code for
    Inception does it. Integer buffers (batch counters) are copied.

    The copy is in evaluation mode, whatever `train()` asks for. Weights, statistics and the count of updates are in the
    state dict, so a run resumes with no further care. As a submodule it adds nothing to train: no parameter of it
    requires a gradient. Under DDP every process keeps the same average, of running statistics too where these are the
    same on all (StepStatistics sees to it).

    The average has the network's precision. In bfloat16 it would not move: `1 - d` is below its resolution.

    Args:
        network: the network to follow. It is copied with its present weights, dtypes and memory formats; a compiled
            network is copied uncompiled.
        decay: in [0, 1); the paper does not say which, 0.9999 is customary.

    Raises:
        ValueError: if decay is outside [0, 1).
    """

    updates: Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay of the average is {decay}, but must be at least 0 and less than 1")
        self.decay = decay
        self.network: nn.Module = copy.deepcopy(getattr(network, "_orig_mod", network)).requires_grad_(False)
        self.network.zero_grad(set_to_none=True)  # deepcopy copies gradients too
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=next(network.parameters()).device))
        self.eval()

    def train(self, mode: bool = True) -> "PolyakAverage":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged network gives for these inputs."""
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take one step towards the network's present weights; call it once after each optimiser step.

        Raises:
            ValueError: if the network has other parameters or buffers than the copied one.
        """
        shadows, values = _tensors(self.network), _tensors(network)
        if [s.shape for s in shadows] != [v.shape for v in values]:
            raise ValueError("the network to average has other parameters or buffers than the one that was copied")
        pull = self._pull()
        for dtype in {shadow.dtype for shadow in shadows}:  # a fused operation takes tensors of one dtype
            mine = [shadow for shadow in shadows if shadow.dtype == dtype]
            theirs = [value for shadow, value in zip(shadows, values, strict=True) if shadow.dtype == dtype]
            if dtype.is_floating_point:
                _pull(mine, theirs, pull.to(dtype))
            else:
                torch._foreach_copy_(mine, theirs)
        self.updates += 1

    def _pull(self) -> Tensor:
        """1 - polyak_decay, on the device: reading the counter on the host would wait for the device at each step."""
        # 1 - (1 + n) / (10 + n) = 9 / (10 + n), without the cancellation.
        dtype = torch.float32 if self.updates.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        return (9.0 / (10.0 + self.updates.to(dtype))).clamp(min=1.0 - self.decay)


def _pull(shadows: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """`shadow -= weight * (shadow - value)`, in one pass over memory where reading the weight waits for nothing."""
    if weight.device.type == "cpu":
        torch._foreach_lerp_(shadows, values, weight.item())
        return
    differences = torch._foreach_sub(shadows, values)
    torch._foreach_mul_(differences, weight)
    torch._foreach_sub_(shadows, differences)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once, in the order of the modules.

    `network.parameters()` makes each one's name on the way, which takes as long as the update of a small network.
    """
    found: dict[int, Tensor] = {}

    def collect(module: nn.Module) -> None:
        for tensors in (module._parameters, module._buffers):
            found.update((id(tensor), tensor) for tensor in tensors.values() if tensor is not None)
        for child in module._modules.values():
            if child is not None:
                collect(child)

    collect(network)
    return list(found.values())
