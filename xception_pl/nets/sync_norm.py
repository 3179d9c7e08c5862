"""Batch norm over the batches of all ranks, on GPUs and on CPUs, with nothing else of the network changed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Function
from torch.nn.modules._functions import SyncBatchNorm


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of the ranks' batches together.

    On a GPU the work is done by the function behind `nn.SyncBatchNorm`, whose kernels a CPU does not have: there the
    same sums are taken by autograd, the variance from the centred values, so that in float64 ranks together equal one
    process to rounding. It is slow (each value is read four times) and meant for tests and small runs. All ranks must
    have batches of one size.

    It remains an `nn.BatchNorm2d`: unlike with `nn.SyncBatchNorm.convert_sync_batchnorm`, code that looks for batch norm
    finds it, and a subclass of timm's that ends in an activation keeps that.
    """

    def forward(self, x: Tensor) -> Tensor:
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if not self.training or ranks == 1:
            y = super().forward(x)
        else:
            if self.track_running_stats:
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
            y = self._on_cpu(x, ranks) if x.device.type == "cpu" else self._on_gpu(x, ranks)
        for name in ("drop", "act"):  # timm's BatchNormAct2d
            y = getattr(self, name, nn.Identity())(y)
        return y

    @property
    def _weight_of_new(self) -> float:
        return self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked or 1)

    def _on_gpu(self, x: Tensor, ranks: int) -> Tensor:
        y: Tensor = SyncBatchNorm.apply(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self._weight_of_new,
            dist.group.WORLD,
            ranks,
        )
        return y

    def _on_cpu(self, x: Tensor, ranks: int) -> Tensor:
        values = x.numel() // x.shape[1] * ranks
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean: Tensor = _SumOverRanks.apply(wide.sum((0, 2, 3))) / values
        centred = wide - mean[:, None, None]
        variance: Tensor = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / values
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            unbiased = variance * values / (values - 1)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self._weight_of_new)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self._weight_of_new)
        y: Tensor = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)


class _SumOverRanks(Function):
    """The sum over ranks; each rank's loss depends on every rank's value, so gradients are summed over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def synchronize(network: nn.Module) -> None:
    """Lets every `nn.BatchNorm2d` in the network use the statistics of all ranks, in place: same modules, same keys.

    Raises:
        ValueError: a subclass computes something that this does not know.
    """
    for name, module in network.named_modules():
        if not isinstance(module, nn.BatchNorm2d) or isinstance(module, SyncBatchNorm2d):
            continue
        if type(module) is not nn.BatchNorm2d and not hasattr(module, "act"):
            raise ValueError(
                f"trainer.sync_batchnorm does not know the batch norm {type(module).__name__} ({name}) of this network: "
                "set it to false."
            )
        module._own_class = type(module)  # type: ignore[assignment]
        module.__class__ = SyncBatchNorm2d


def restore(network: nn.Module) -> None:
    """Undoes `synchronize`."""
    for module in network.modules():
        if isinstance(module, SyncBatchNorm2d):
            own_class: Any = module._own_class
            del module._own_class
            module.__class__ = own_class
