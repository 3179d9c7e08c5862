"""Whether a contender computes the right thing: its outputs, or its loss and gradients, against float64.

The reference shares no convolution with the contenders: a depthwise one is a sum of nine shifted products, a pointwise
one a matrix product. That also spares it torch's float64 convolutions, which are many times slower.
"""

from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception_pl.bench.task import Task

Outcome = dict[str, Tensor]
"""What is compared: `logits` of inference; `loss` of a training step and the gradients by our parameters' names."""

COMPARED_IMAGES = 4  # of inference, where images do not know of each other
LIMIT = 1e-4  # of logits and loss
GRADIENT_LIMIT = 0.1  # float32 comes to 2e-2 in single gradients: a maximum or a ReLU switches between two roundings
MEDIAN_LIMIT = 2e-2  # of the gradients' errors; of two small images one switch can leave 5e-3, of more 4e-6


class ExactConv2d(nn.Module):
    """A bias-free convolution of stride 1 or 2 as shifted products and a matrix product, for any dtype."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is None
        assert conv.dilation == (1, 1)
        rows, columns = (int(padding) for padding in conv.padding)
        self.weight, self.stride, self.padding = conv.weight, conv.stride[0], (columns, columns, rows, rows)
        self.depthwise = conv.groups == conv.in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.padding)
        rows, columns = self.weight.shape[2:]
        height, width = (x.shape[2] - rows) // self.stride + 1, (x.shape[3] - columns) // self.stride + 1
        total: Tensor | None = None
        for i in range(rows):
            for j in range(columns):
                shifted = x[:, :, i : i + self.stride * height : self.stride, j : j + self.stride * width : self.stride]
                kernel = self.weight[:, :, i, j]
                product = shifted * kernel[:, 0, None, None] if self.depthwise else _across(shifted, kernel)
                total = product if total is None else total + product
        assert total is not None
        return total


def _across(x: Tensor, kernel: Tensor) -> Tensor:
    """A 1 × 1 convolution: (B, C, H, W) and (D, C) to (B, D, H, W)."""
    rows, columns = x.shape[2:]
    return torch.matmul(kernel, x.flatten(2)).view(-1, len(kernel), rows, columns)


def exact(task: Task) -> Outcome:
    """The outcome in float64, on the task's device."""
    network = task.network().double().to(task.device)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                setattr(module, name, ExactConv2d(child))
    images, labels = task.images.double().to(task.device), task.labels.to(task.device)
    if not task.training:
        with torch.inference_mode():
            return {"logits": network(images[:COMPARED_IMAGES]).cpu()}
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    return {"loss": loss.detach().cpu()} | {
        name: parameter.grad.cpu() for name, parameter in network.named_parameters() if parameter.grad is not None
    }


def errors(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """The relative error (L2) of each tensor.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    found = {}
    for name, right in reference.items():
        if name not in outcome:
            raise ValueError(f"gives no {name}")
        value = outcome[name][: len(right)] if name == "logits" else outcome[name]
        if value.shape != right.shape:
            raise ValueError(f"gives {name} of shape {tuple(value.shape)} instead of {tuple(right.shape)}")
        found[name] = float((value.double() - right).norm() / right.norm())
    return found


def verdict(found: dict[str, float], plain: dict[str, float] | None = None) -> tuple[float, str | None]:
    """The typical error (that of the logits, or the median over loss and gradients), and what is wrong, or None.

    Args:
        found: A contender's errors.
        plain: Those of the plain torch network in the same precision, which a contender in less than float32 may
            double; thirty-six layers of bfloat16 leave gradients that differ by a third.
    """
    typical = median(found.values())
    usual = 0.0 if plain is None else median(plain.values())
    for name, error in found.items():
        limit = LIMIT if name in ("logits", "loss") else GRADIENT_LIMIT
        if plain is not None:
            limit = max(limit, 2 * plain[name], 0.0 if name == "loss" else 2 * usual)
        if not error <= limit:  # NaN is wrong too
            return typical, f"{name} is off by {error:.2g}, more than {limit:.2g}"
    if not typical <= max(MEDIAN_LIMIT, 2 * usual):
        return typical, f"half of the gradients are off by {typical:.2g}, more than {max(MEDIAN_LIMIT, 2 * usual):.2g}"
    return typical, None
