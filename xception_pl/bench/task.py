"""What all contenders compute: the same network with the same weights on the same batch."""

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception_pl.nets.xception import Xception

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training step (forward, loss, backward, SGD with momentum) or a forward pass, and what it is done with.

    Training keeps weights in float32 and computes in the precision by autocast; inference has its weights in the precision.

    Args:
        training: A training step, or inference.
        device: Where: cpu, cuda, cuda:1 …
        precision: Of the arithmetic.
        images: (B, 3, S, S) in [-1, 1], float32, on the CPU.
        labels: (B,), on the CPU.
        weights: State dict of our network, float32, on the CPU.
    """

    training: bool
    device: torch.device
    precision: Precision
    images: Tensor
    labels: Tensor
    weights: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """That of the arithmetic."""
        return DTYPES[self.precision]

    @property
    def batch(self) -> int:
        """Images a step."""
        return len(self.images)

    def network(self) -> Xception:
        """Our network with the task's weights, on the CPU. Dropout is off: contenders could not be compared."""
        with torch.device("meta"):  # weights that would be overwritten are not drawn
            network = Xception(CLASSES, dropout=0.0)
        network.load_state_dict({name: value.clone() for name, value in self.weights.items()}, assign=True)
        return network.train(self.training)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_task(*, training: bool, device: str, precision: Precision, batch: int, size: int, seed: int = 0) -> Task:
    """Seeded images, labels and weights; every number of the norms is away from its start.

    The images are smooth, as photographs are: of noise the last feature maps would all look alike.
    """
    torch.manual_seed(seed)
    coarse = torch.rand(batch, 3, 12, 12) * 2 - 1
    images = F.interpolate(coarse, size=(size, size), mode="bicubic") + 0.1 * torch.randn(batch, 3, size, size)
    images = images.clamp(-1, 1)
    network = Xception(CLASSES, dropout=0.0)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.3)
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(images[:8])  # running statistics are those of these images
    return Task(
        training=training,
        device=torch.device(device),
        precision=precision,
        images=images,
        labels=torch.randint(CLASSES, (batch,)),
        weights={name: value.clone() for name, value in network.state_dict().items()},
    )


def machine(task: Task) -> dict[str, str | int]:
    """What was measured on."""
    found: dict[str, str | int] = {"device": _processor(), "cores": len(os.sched_getaffinity(0))}
    found |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    if task.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(task.device)
        found["cuda"] = str(torch.version.cuda)
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "unknown processor"
