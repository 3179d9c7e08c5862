"""How the ranks exchange gradients: Lightning's DDP with this project's settings."""

from datetime import timedelta
from inspect import signature
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from xception_pl.module import XceptionModule
from xception_pl.nets.sync_norm import restore, synchronize
from xception_pl.run.launcher import Launcher

_BROADCAST = next(  # the name that torch 2.15 gave it
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)
_SETTINGS: dict[str, Any] = {
    # Gradients are views of the buckets that are reduced: no second copy of them (91 MB in fp32), no copying.
    "gradient_as_bucket_view": True,
    # Each parameter has a gradient in each step (those of the averaged network ask for none, and DDP leaves them alone):
    # nothing to search for. What a static graph adds is for networks of which a step leaves parts out, or which use
    # re-entrant checkpointing; buckets follow the order of the first backward pass without it too. And it cannot tell
    # the accumulated batches of a step, which have no reduction, from the last, which has.
    "find_unused_parameters": False,
    "static_graph": False,
    # StepStatistics averages batch norm's statistics once a step, beside the backward pass; a broadcast of rank 0's,
    # with those of the averaged network, would come before each forward pass, which waits for it.
    _BROADCAST: False,
}


class Ddp(DDPStrategy):
    """Lightning's DDP, between the processes of `launcher` or those that Lightning starts on this node.

    Args:
        launcher: What started the processes; None lets Lightning start them.
        timeout_seconds: For which a rank waits for another in a collective operation.
        compress: Exchange gradients in bfloat16: half the bytes, for links that the backward pass does not hide.
    """

    def __init__(self, launcher: Launcher | None, *, timeout_seconds: float, compress: bool) -> None:
        super().__init__(
            cluster_environment=_environment(launcher), timeout=timedelta(seconds=timeout_seconds), **_SETTINGS
        )
        self.compress = compress

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # Lightning registers hooks on GPUs alone; gloo takes them as well.
        wrapped = super()._setup_model(model)
        if self.compress:
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped


class SyncNorm(LayerSync):
    """`trainer.sync_batchnorm` for the network that trains; Lightning's own loses the activations of timm's networks."""

    def apply(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, XceptionModule)
        synchronize(model.network)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, XceptionModule)
        restore(model.network)
        return model


def _environment(launcher: Launcher | None) -> LightningEnvironment | SLURMEnvironment | TorchElasticEnvironment:
    if launcher is None:
        return LightningEnvironment()
    # Signals are the run's own affair: Lightning's requeueing saves inside the signal handler.
    return TorchElasticEnvironment() if launcher.name == "torchrun" else SLURMEnvironment(auto_requeue=False)
