"""Losses by the recipe's name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xception_pl.optim.config import OptimConfig


def loss_function(config: OptimConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The recipe's loss, a function `(logits, targets) -> scalar`, averaged over the batch.

    - `cross_entropy`: logits (N, K); targets class indices (N,) or probabilities (N, K), as mixup and CutMix make them.
      Label smoothing e turns targets q into `(1 - e) * q + e / K`.
    - `sigmoid`: logits (N, K); targets (N, K) of zeros and ones (probabilities after mixup). The binary cross-entropies
      of an image are **summed over the classes**: minus the log-likelihood of its label set. The paper is silent. With
      a mean, the gradient would shrink with the number of classes (17,000 in JFT) while L2 and RMSprop's eps inside
      the root stayed, and a rate tuned for one set of classes would not suit another.

    Logits in half precision are raised to float32 first.
    """

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_raised(logits), targets, label_smoothing=config.label_smoothing)

    def sigmoid(logits: Tensor, targets: Tensor) -> Tensor:
        logits = _raised(logits)
        terms = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        return terms.sum(dim=1).mean()

    return cross_entropy if config.loss == "cross_entropy" else sigmoid


def _raised(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
