"""Which kernels a network trains with: the plain torch path, or the fused one of its device."""

from importlib import import_module
from typing import Literal, Protocol, cast

import torch
from torch import nn

from xception_pl.nets.xception import Xception

Kernels = Literal["auto", "torch", "fused"]

PATHS: dict[str, str] = {"cpu": "xception_pl.kernels.cpu", "cuda": "xception_pl.kernels.gpu"}
"""Device types that have a fused path, and the module that holds it."""


class FusedPath(Protocol):
    """What a module of `PATHS` offers."""

    def unavailable(self, network: Xception, device: torch.device) -> str | None:
        """Why this network cannot take the path on this device; None where it can. A clause without a full stop."""

    def unproven(self, network: Xception, device: torch.device) -> str | None:
        """Why `auto` leaves a path that could be taken: nothing shows that it is faster here. None where it is."""

    def fuse(self, network: Xception) -> str:
        """Switches the network, in place, to the path; returns what the path is, in a few words."""


def use_kernels(network: nn.Module, kernels: Kernels, device: torch.device) -> str:
    """Switches a network, in place, to the fastest path that is right for a device.

    The network keeps its parameters, buffers, their names, and its class as far as `isinstance` goes; only how the
    training step is computed changes. In evaluation mode it computes as before. Copies that were made earlier, such as
    the averaged network, stay on the torch path.

    Args:
        network: any network; only a plain :class:`~xception_pl.nets.xception.Xception` has another path.
        kernels: `torch` leaves the network alone, `fused` takes the fused path or refuses, `auto` takes it where it is
            right and known to be faster.
        device: where the network will train; it need not be there yet.

    Returns:
        The path and why, such as "torch: there are no fused kernels for mps".

    Raises:
        ValueError: `kernels` is `fused`, and the network or the device does not allow it.
    """
    if kernels == "torch":
        return "torch: as model.kernels says"
    path = cast(FusedPath, import_module(PATHS[device.type])) if device.type in PATHS else None
    problem = _unfit(network)
    if problem is None and path is None:
        problem = f"there are no fused kernels for {device.type}"
    if problem is None:
        assert path is not None
        assert isinstance(network, Xception)
        problem = path.unavailable(network, device)
        if problem is None and kernels == "auto":
            problem = path.unproven(network, device)
        if problem is None:
            return f"fused: {path.fuse(network)}"
    if kernels == "fused":
        raise ValueError(f"model.kernels fused is not possible here: {problem}; use auto or torch.")
    return f"torch: {problem}"


def _unfit(network: nn.Module) -> str | None:
    """Why no device has another path for this network."""
    if not isinstance(network, Xception):
        return f"only xception has fused kernels, not {type(network).__name__}"
    if network.grad_checkpointing:
        return "grad_checkpointing recomputes the plain layers"
    if network.numerics != "keras":
        return f"the fused kernels pool as Keras does, not as model.numerics {network.numerics}"
    norms = (module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    if any(norm.training != network.training for norm in norms) or any(
        not p.requires_grad for p in network.parameters()
    ):
        return "parts of it are frozen"
    return None
