"""FastEval14k's metric: mean average precision of 100 predictions, classes weighted (Section 4.1, Table 2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

# Sums over a whole validation set want float64; Apple's GPUs have none.
_SUM = torch.float32 if torch.backends.mps.is_available() else torch.float64


class MeanAveragePrecisionAtK(Metric):
    """MAP@k over images with any number of labels, with optional class weights.

    The classes of an image are ranked by score and the first k predictions kept. A positive class c found at rank r
    contributes the precision there, `hits(r) / r`. With `P` the image's positives and `n = min(|P|, k)`:

        MAP@k = sum over images of 1/n * sum over found c of w_c * hits(r_c) / r_c
              / sum over images of 1/n * sum over the n largest w_c in P

    Without weights this is the usual MAP@k, the mean over images of `1/n * sum of precisions`. It is 1 for a perfect
    ranking, also where an image has more than k positives, and lies in [0, 1] (the paper's Table 2 shows percent).

    The paper says that it takes the top 100 predictions and weights "the contribution of each class to MAP@100" by how
    common it is; neither these weights nor a formula are published. Our choices where it is silent: precision itself
    is not weighted; weights act inside and between images; images without a positive (or with weights of 0 alone) do
    not count; equal scores are ranked by class index, lowest first; NaN ranks last; nothing to average gives NaN.

    Both sums are states, so the value is the same however images are spread over batches and processes.

    Args:
        class_weights: one non-negative number a class, only their ratios matter; None weights all alike.
        k: predictions kept an image.

    Raises:
        ValueError: for weights that are negative, not finite or all zero, for a k below 1, and in `update` for shapes
            that do not fit.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    gained: Tensor
    possible: Tensor

    def __init__(self, class_weights: Sequence[float] | Tensor | None = None, k: int = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"k is {k}, but MAP@k needs at least one prediction an image")
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=_SUM)
        if weights is not None and not (weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()):
            raise ValueError("class weights must be finite and non-negative, and one of them positive")
        self.k = k
        self.class_weights = weights  # no buffer: module.to(torch.bfloat16) would round it
        self.add_state("gained", torch.zeros((), dtype=_SUM), dist_reduce_fx="sum")
        self.add_state("possible", torch.zeros((), dtype=_SUM), dist_reduce_fx="sum")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            scores: (N, classes), larger is more likely; logits, so that no two saturate to the same probability.
            targets: (N, classes), above zero where the class is a label of the image.
        """
        if scores.ndim != 2 or scores.shape != targets.shape:
            raise ValueError(
                f"scores and targets must have one shape (images, classes), "
                f"not {tuple(scores.shape)} and {tuple(targets.shape)}"
            )
        classes = scores.shape[1]
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ValueError(f"there are {len(self.class_weights)} class weights for {classes} classes")

        positive = targets > 0
        weights = positive.to(_SUM)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(scores.device)
            weights = weights * self.class_weights
        scores = torch.where(scores.isnan(), -torch.inf, scores)
        first = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.k]

        hit = positive.gather(1, first)
        precision = hit.cumsum(1) / torch.arange(1, first.shape[1] + 1, device=scores.device, dtype=_SUM)
        gained = (weights.gather(1, first) * precision).sum(1)
        # Weights of negatives are 0, so the k largest are the n largest of the positives and zeros.
        possible = weights.topk(first.shape[1], dim=1).values.sum(1)
        share = positive.sum(1).clamp(1, self.k)  # an image without a positive adds 0 / 1 to both sums

        # Not in place, so that a state which module.to(torch.bfloat16) has rounded is float64 again.
        self.gained = self.gained + (gained / share).sum()
        self.possible = self.possible + (possible / share).sum()

    def compute(self) -> Tensor:
        """The metric so far, a scalar in [0, 1]; NaN if no image had a positive."""
        return self.gained / self.possible
