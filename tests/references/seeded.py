"""What both sides of the parity proof draw from a seed, with NumPy alone: Xception's weights and the batches it sees.

Each tensor has its own generator, seeded by its name, so neither side depends on the other's order of layers.
"""

from typing import Any
from zlib import crc32

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

SEED = 1610
SIZE, BATCH, CLASSES, STEPS = 71, 4, 10, 10
# Keras casts these settings to float32 on their way to float64, so both sides take what float32 makes of them.
LEARNING_RATE, MOMENTUM, L2 = (float(np.float32(x)) for x in (0.01, 0.9, 1.0e-4))
"""L2 in Keras' sense: the penalty is L2 times the sum of squares. More than the paper's, so that ten steps show it."""


def generator(name: str) -> np.random.RandomState:
    """The generator of one tensor. NumPy guarantees RandomState's numbers for good, default_rng's it does not."""
    return np.random.RandomState(crc32(name.encode()) ^ SEED)


def weight(name: str, shape: tuple[int, ...]) -> Array:
    """An initial weight by its Keras name, `layer/variable`, and Keras shape; shortcuts are `blockN_shortcut[_bn]`."""
    draw = generator(name)
    match name.rsplit("/", 1)[1]:
        case "gamma" | "moving_variance":
            return draw.uniform(0.5, 1.5, shape)
        case "beta" | "moving_mean" | "bias":
            return draw.normal(0.0, 0.1, shape)
        case "depthwise_kernel":
            fan_in = shape[0] * shape[1]
        case "kernel" | "pointwise_kernel":
            fan_in = int(np.prod(shape[:-1]))
        case other:
            raise AssertionError(other)
    return draw.normal(0.0, fan_in**-0.5, shape)


def batch(step: int) -> tuple[Array, np.ndarray[Any, np.dtype[np.int64]]]:
    """Images (BATCH, SIZE, SIZE, 3) in [-1, 1] and their labels (BATCH,)."""
    draw = generator(f"batch {step}")
    return draw.uniform(-1.0, 1.0, (BATCH, SIZE, SIZE, 3)), draw.randint(CLASSES, size=BATCH)


def summary(name: str, value: Array) -> dict[str, Any]:
    """A tensor in Keras' axes, after training, in a few numbers: what it is and how far it came.

    `norm` and `moved` are Euclidean norms of the value and of its difference to the drawn start; `entries` are five
    values at drawn places.
    """
    places = generator(f"{name} places").randint(value.size, size=5)
    return {
        "shape": list(value.shape),
        "norm": float(np.linalg.norm(value)),
        "moved": float(np.linalg.norm(value - weight(name, value.shape))),
        "mean": float(value.mean()),
        "entries": [float(v) for v in value.ravel()[places]],
    }
