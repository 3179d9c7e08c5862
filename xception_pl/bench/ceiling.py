"""What the machine itself can do, measured on the spot: a large matrix product and a large copy.

Both take turns with the contenders, so that a share of the ceiling compares what was measured side by side.
"""

from dataclasses import dataclass

import torch

from xception_pl.bench.task import CLASSES, Task
from xception_pl.nets.traffic import WAYS, Kernel, Way, kernels, seconds
from xception_pl.nets.xception import Xception

PRODUCT, COPY = "matrix product", "copy"
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}


class MatrixProduct:
    """Turns of a large square product in the task's precision."""

    def __init__(self, task: Task) -> None:
        self.task = task
        size = PRODUCT_SIZE[task.device.type]
        self.operations = 2 * size**3
        self.left, self.right = (torch.randn(size, size, device=task.device, dtype=task.dtype) for _ in range(2))
        self.product = torch.empty(size, size, device=task.device, dtype=task.dtype)

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            torch.mm(self.left, self.right, out=self.product)
        self.task.wait()


class Copy:
    """Turns of a copy too large for any cache."""

    def __init__(self, task: Task) -> None:
        self.task = task
        size = COPY_BYTES[task.device.type]
        self.bytes = 2 * size  # read and written
        self.source = torch.ones(size, device=task.device, dtype=torch.uint8)
        self.target = torch.empty_like(self.source)

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            self.target.copy_(self.source)
        self.task.wait()


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The counted work of an image, and the least seconds that it takes at given rates.

    Args:
        batch: Images a step, over which the traffic of the weights is spread.
        element_bytes: Of activations and weights.
        passes: The kernels of each way of computing.
    """

    batch: int
    element_bytes: int
    passes: dict[Way, list[Kernel]]

    @classmethod
    def of(cls, task: Task) -> "Ceiling":
        with torch.device("meta"):
            network = Xception(CLASSES)
        size = task.images.shape[-1]
        passes: dict[Way, list[Kernel]] = {way: kernels(network, size, way, training=task.training) for way in WAYS}
        return cls(batch=task.batch, element_bytes=task.dtype.itemsize, passes=passes)

    @property
    def operations(self) -> int:
        """Floating-point operations an image."""
        return 2 * sum(kernel.macs for kernel in self.passes["eager"])

    def bytes(self, way: Way) -> float:
        """Bytes moved an image."""
        return sum(kernel.bytes(self.element_bytes, self.batch) for kernel in self.passes[way])

    def seconds(self, way: Way, *, rate: float, bandwidth: float) -> float:
        """Least seconds an image, each kernel bound by its bytes or by its arithmetic.

        Args:
            way: How it is computed.
            rate: Floating-point operations a second.
            bandwidth: Bytes a second.
        """
        return seconds(
            self.passes[way], element_bytes=self.element_bytes, batch=self.batch, bandwidth=bandwidth, rate=rate
        )

    def memory_share(self, way: Way, *, rate: float, bandwidth: float) -> float:
        """Share of those seconds in kernels that are bound by their bytes."""
        total = self.seconds(way, rate=rate, bandwidth=bandwidth)
        bound = [
            kernel
            for kernel in self.passes[way]
            if kernel.bytes(self.element_bytes, self.batch) / bandwidth > 2 * kernel.macs / rate
        ]
        return (
            seconds(bound, element_bytes=self.element_bytes, batch=self.batch, bandwidth=bandwidth, rate=rate) / total
        )
