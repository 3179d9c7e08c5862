"""What a network said about each image, and how the shares of several processes become one."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from xception_pl.optim.config import Loss

TOP = 5

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of N images, one row each: everything the statistics are made of."""

    ids: Ints
    """(N,) row of the split, counted from 0."""
    labels: Ints
    """(N,)"""
    classes: Ints
    """(N, k) classes with the largest logits, largest first; equal logits in the order of the classes; k is 5 or all."""
    probabilities: Floats
    """(N, k) theirs: softmax, or sigmoid where the network was trained with it."""
    losses: Floats
    """(N,) cross-entropy in nats; with sigmoid the sum of all classes' binary ones."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> Ints:
        """(N,) the class with the largest logit."""
        return self.classes[:, 0]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """(N,) whether that is the label."""
        right: npt.NDArray[np.bool_] = self.predicted == self.labels
        return right

    @property
    def in_top(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the label is among the k classes."""
        held: npt.NDArray[np.bool_] = (self.classes == self.labels[:, None]).any(axis=1)
        return held

    def without(self, ids: Ints) -> "Scores":
        """The rows whose id is not in `ids`."""
        kept = ~np.isin(self.ids, ids)
        return Scores(**{item.name: getattr(self, item.name)[kept] for item in fields(self)})


def score(logits: Tensor, labels: Tensor, ids: Tensor, loss: Loss = "cross_entropy") -> Scores:
    """Scores of a batch from logits (B, K), labels (B,) and row ids (B,), by the loss that the network was trained with.

    The logits are as the network gave them; all that follows is float64 on the CPU, the same wherever the network ran.

    Raises:
        ValueError: a logit is NaN.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    broken = logits.isnan().any(dim=1)
    if broken.any():
        raise ValueError(
            f"the network gives NaN for image {ids[broken][0]}: its weights or its precision are not sound"
        )
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
    log_probabilities = F.logsigmoid(logits) if loss == "sigmoid" else logits.log_softmax(dim=1)
    losses = -log_probabilities.gather(1, labels[:, None])[:, 0]
    if loss == "sigmoid":
        log_others = F.logsigmoid(-logits)
        losses -= log_others.sum(dim=1) - log_others.gather(1, labels[:, None])[:, 0]
    return Scores(
        ids=ids.cpu().numpy(),
        labels=labels.numpy(),
        classes=order.numpy(),
        probabilities=log_probabilities.gather(1, order).exp().numpy(),
        losses=losses.numpy(),
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """All rows in the order of their ids, so that sums do not depend on which process had which images.

    Raises:
        AssertionError: an id stands twice.
    """
    if not parts:
        nothing = torch.empty(0, dtype=torch.int64)
        return score(torch.empty(0, 1), nothing, nothing)
    together = {item.name: np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Scores)}
    order = np.argsort(together["ids"], kind="stable")
    assert len(np.unique(together["ids"])) == len(order), "an image was evaluated twice"
    return Scores(**{name: values[order] for name, values in together.items()})
