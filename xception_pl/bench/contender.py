"""A contender: something that computes the task, started once, then run in turns; torch networks in each of their modes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception_pl.bench.check import Outcome
from xception_pl.bench.task import Task
from xception_pl.nets.cost import saved_bytes
from xception_pl.nets.traffic import Way

LEARNING_RATE = 1e-4
MOMENTUM = 0.9


class Runner(Protocol):
    """A contender that was started."""

    def outcome(self) -> Outcome:
        """One step from the task's weights: what is compared with float64. Called once, first."""

    def turn(self, steps: int) -> None:
        """Takes so many steps, and returns when they are done."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to measure.

    Args:
        name: `owner:mode`, as options and tables call it.
        way: How often it passes over memory, for the ceiling of its own.
        start: Builds it.
        unfit: Why it cannot take this task; None where it can. Imports nothing heavy.
    """

    name: str
    way: Way
    start: Callable[[Task], Runner]
    unfit: Callable[[Task], str | None] = lambda task: None

    @property
    def owner(self) -> str:
        """Whose it is: xception_pl, timm, …"""
        return self.name.partition(":")[0]


class TorchTraining:
    """Training steps of a torch network: autocast, SGD with momentum, fp16 with a scaled loss.

    Args:
        network: In training mode, on the CPU.
        task: What is computed.
        channels_last: Memory layout.
        compile: Through torch.compile.
        names: The network's parameter names to ours, where they differ.
        prepare: What else is done to the network on its device, such as other kernels.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        *,
        channels_last: bool,
        compile: bool = False,
        names: dict[str, str] | None = None,
        prepare: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self.task, self.names, self.network = task, names or {}, network.to(task.device)
        images = task.images.to(task.device)
        if channels_last:
            network.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        if prepare is not None:
            prepare(network)
        self.images, self.labels = images, task.labels.to(task.device)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(network) if compile else network
        self.optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        self.scaler = torch.amp.GradScaler(task.device.type, init_scale=1024.0, enabled=task.precision == "fp16")

    def loss(self) -> Tensor:
        """Of a forward pass."""
        autocast = torch.autocast(
            self.task.device.type, self.task.dtype, enabled=self.task.precision in ("bf16", "fp16")
        )
        with autocast:
            return F.cross_entropy(self.forward(self.images), self.labels)

    def outcome(self) -> Outcome:
        loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = {
            self.names.get(name, name): parameter.grad.float().cpu()
            for name, parameter in self.network.named_parameters()
            if parameter.grad is not None
        }
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {"loss": loss.detach().float().cpu(), **gradients}

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.scaler.scale(self.loss()).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.task.wait()

    def saved_bytes(self) -> int:
        """Bytes that a forward pass keeps for the backward pass."""
        return saved_bytes(self.loss, self.network)


class TorchInference:
    """Forward passes of anything that takes images and gives logits on the task's device."""

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        task: Task,
        *,
        channels_last: bool,
        compile: bool = False,
    ) -> None:
        self.task = task
        images = task.images.to(task.device, task.dtype)
        if isinstance(network, nn.Module):
            network = network.to(task.device, task.dtype)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
            if isinstance(network, nn.Module):
                network.to(memory_format=torch.channels_last)
        self.images = images
        self.forward = torch.compile(network) if compile else network

    @torch.inference_mode()
    def outcome(self) -> Outcome:
        return {"logits": self.forward(self.images).float().cpu()}

    @torch.inference_mode()
    def turn(self, steps: int) -> None:
        for _ in range(steps):
            self.forward(self.images)
        self.task.wait()


def torch_modes(
    owner: str, network: Callable[[Task], nn.Module], names: Callable[[], dict[str, str]] = dict
) -> list[Contender]:
    """A torch network eager in both layouts, and compiled with channels last.

    Args:
        owner: First part of the contenders' names.
        network: Builds it with the task's weights, on the CPU.
        names: Its parameters' names to ours, where they differ.
    """

    def start(task: Task, **mode: Any) -> Runner:
        if task.training:
            return TorchTraining(network(task), task, names=names(), **mode)
        return TorchInference(network(task), task, **mode)

    return [
        Contender(name=f"{owner}:nchw", way="eager", start=lambda task: start(task, channels_last=False)),
        Contender(name=f"{owner}:channels_last", way="eager", start=lambda task: start(task, channels_last=True)),
        Contender(
            name=f"{owner}:compile", way="compiled", start=lambda task: start(task, channels_last=True, compile=True)
        ),
    ]
