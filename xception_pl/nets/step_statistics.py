"""Batch norm's running statistics as a function of the step, not of how ranks and micro-batches share it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from xception_pl.nets.sync_norm import SyncBatchNorm2d


class StepStatistics:
    """Makes an optimiser step one update of the running statistics: the mean of its batches' statistics.

    A global batch is cut into micro-batches, over ranks and in time. Left alone, each rank would keep statistics of its
    own batches (DDP then broadcasts rank 0's before each forward pass) and k accumulated batches would be k updates,
    which forget k times as fast. Here every micro-batch starts from the statistics before the step, and what comes out is
    averaged over micro-batches and ranks: k accumulated batches equal k ranks, and all ranks have the same
    statistics after each step, in which a validation, an average of weights or a checkpoint may find them.

    The average over ranks is one all-reduce of the statistics (two numbers a channel), begun when the step's last
    forward pass is done and awaited after its backward pass, beside which it runs.

    Args:
        network: On the device it trains on. Batch norms in evaluation mode keep their statistics.
    """

    def __init__(self, network: nn.Module) -> None:
        norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        found = [buffer for norm in norms if norm.training for buffer in (norm.running_mean, norm.running_var)]
        self._buffers: list[Tensor] = [buffer for buffer in found if buffer is not None]
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._ranks = 1 if any(isinstance(norm, SyncBatchNorm2d) for norm in norms) else ranks
        self._before: list[Tensor] | None = None
        self._sum: Tensor | None = None
        self._batches = 0
        self._reduction: Any = None

    @torch.no_grad()
    def batch_begins(self, *, last: bool) -> None:
        """Before a micro-batch's forward pass; `last` of its step."""
        if self._before is not None:
            self._write(self._before)
        elif not last:
            self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def batch_ends(self, *, last: bool) -> None:
        """After the forward pass. Nothing is written yet: the backward pass insists on the buffers it has seen."""
        if not self._buffers or (last and self._before is None and self._ranks == 1):
            return  # one batch on one rank: what it left is the step's
        flat = torch.cat([buffer.flatten() for buffer in self._buffers])
        self._sum = flat if self._sum is None else self._sum.add_(flat)
        self._batches += 1
        if last and self._ranks > 1:
            self._reduction = dist.all_reduce(self._sum, async_op=True)

    @torch.no_grad()
    def step_ends(self) -> None:
        """After the backward pass of the step's last batch."""
        if self._sum is None:
            return
        if self._reduction is not None:
            self._reduction.wait()
        mean = self._sum / (self._batches * self._ranks)
        parts = mean.split([buffer.numel() for buffer in self._buffers])
        self._write([part.view_as(buffer) for part, buffer in zip(parts, self._buffers, strict=True)])
        self._before = self._sum = self._reduction = None
        self._batches = 0

    def _write(self, values: list[Tensor]) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, values)
