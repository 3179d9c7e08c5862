"""Losses against formulas written out."""

import math

import pytest
import torch

from xception_pl.optim.config import OptimConfig
from xception_pl.optim.losses import loss_function

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)
LOG_P = [[z - math.log(sum(math.exp(y) for y in row)) for z in row] for row in LOGITS.tolist()]


def test_cross_entropy_of_indices() -> None:
    loss = loss_function(OptimConfig())(LOGITS, torch.tensor([2, 0]))
    assert loss.item() == pytest.approx(-(LOG_P[0][2] + LOG_P[1][0]) / 2, rel=1e-14)


def test_smoothing_spreads_its_mass_over_all_classes() -> None:
    loss = loss_function(OptimConfig(label_smoothing=0.3))(LOGITS, torch.tensor([2, 0]))
    targets = [[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]
    expected = -sum(t * p for row, log_p in zip(targets, LOG_P, strict=True) for t, p in zip(row, log_p, strict=True))
    assert loss.item() == pytest.approx(expected / 2, rel=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_give_the_mixed_loss(smoothing: float) -> None:
    """Mixup's probabilities: the loss is linear in the targets."""
    loss = loss_function(OptimConfig(label_smoothing=smoothing))
    first, second = torch.tensor([2, 0]), torch.tensor([1, 1])
    mixed = 0.3 * torch.nn.functional.one_hot(first, 3) + 0.7 * torch.nn.functional.one_hot(second, 3)
    expected = 0.3 * loss(LOGITS, first) + 0.7 * loss(LOGITS, second)
    torch.testing.assert_close(loss(LOGITS, mixed.double()), expected, rtol=1e-6, atol=0.0)


def test_sigmoid_sums_over_classes_and_averages_over_images() -> None:
    sets = torch.tensor([[1, 0, 1], [0, 0, 0]])

    def term(logit: float, label: int) -> float:
        return math.log1p(math.exp(-logit if label else logit))

    terms = [
        term(z, y)
        for row, labels in zip(LOGITS.tolist(), sets.tolist(), strict=True)
        for z, y in zip(row, labels, strict=True)
    ]
    assert loss_function(OptimConfig(loss="sigmoid"))(LOGITS, sets).item() == pytest.approx(sum(terms) / 2, rel=1e-14)


@pytest.mark.parametrize("name", ["cross_entropy", "sigmoid"])
def test_half_precision_logits_are_raised(name: str) -> None:
    logits = LOGITS.to(torch.bfloat16).requires_grad_()
    targets = torch.tensor([2, 0]) if name == "cross_entropy" else torch.tensor([[1, 0, 1], [0, 0, 0]])
    loss = loss_function(OptimConfig(loss=name))(logits, targets)  # type: ignore[arg-type]
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
