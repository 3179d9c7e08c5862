"""The statistics against SciPy, torchmetrics and counting by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from xception_pl.evaluation.scores import Scores, joined, score
from xception_pl.evaluation.statistics import (
    by_class,
    calibration_error,
    confused_pairs,
    confusion_matrix,
    mcnemar_exact,
    paired_test,
    reliability,
    summarised,
    wilson_interval,
    worst_classes,
)


def random_scores(images: int = 500, classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Scores]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator) * 2
    labels = torch.randint(classes, (images,), generator=generator)
    return logits, labels, score(logits, labels, torch.arange(images))


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (1, 1), (7, 10), (39_503, 50_000)])
def test_wilson_interval_is_scipys(successes: int, trials: int) -> None:
    reference = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((reference.low, reference.high), abs=1e-12)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (12, 12), (3, 15), (700, 812), (9_000, 9_400)])
def test_mcnemars_test_is_the_exact_binomial_one(b: int, c: int) -> None:
    reference = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(reference, rel=1e-9)


def test_calibration_is_torchmetrics() -> None:
    logits, labels, scores = random_scores()
    reference = multiclass_calibration_error(logits.double().softmax(1), labels, 7, n_bins=15, norm="l1")
    assert calibration_error(reliability(scores)) == pytest.approx(float(reference), abs=1e-6)
    assert sum(bin.images for bin in reliability(scores)) == 500


def test_bins_close_on_the_right() -> None:
    logits = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    bins = reliability(score(logits, torch.tensor([0, 0]), torch.tensor([0, 1])), bins=2)
    assert [bin.images for bin in bins] == [1, 1]  # 0.5 lies in (0, 0.5], 1 in (0.5, 1]
    assert (bins[1].confidence, bins[1].accuracy) == (1.0, 1.0)


def test_the_confusion_matrix_is_torchmetrics() -> None:
    logits, labels, scores = random_scores()
    assert confusion_matrix(scores, 7).tolist() == multiclass_confusion_matrix(logits, labels, 7).tolist()


def test_scores_are_pytorchs() -> None:
    logits, labels, scores = random_scores()
    losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    assert scores.losses.tolist() == losses.tolist()
    top = logits.topk(5)
    assert scores.classes.tolist() == top.indices.tolist()
    assert scores.probabilities == pytest.approx(logits.double().softmax(1).gather(1, top.indices).numpy(), rel=1e-12)
    summary = summarised(scores, 7)
    assert summary.top1 == float((logits.argmax(1) == labels).double().mean())
    assert summary.top5 == float((top.indices == labels[:, None]).any(1).double().mean())
    assert summary.loss == pytest.approx(float(losses.mean()), rel=1e-15)


def test_equal_logits_rank_in_the_order_of_the_classes() -> None:
    scores = score(torch.zeros(1, 9), torch.tensor([5]), torch.tensor([0]))
    assert scores.classes.tolist() == [[0, 1, 2, 3, 4]]
    assert not scores.in_top[0]


def test_fewer_than_five_classes_have_all_in_top5() -> None:
    _, _, scores = random_scores(classes=3)
    assert scores.classes.shape == (500, 3)
    assert summarised(scores, 3).top5 == 1.0


def test_nan_is_named() -> None:
    with pytest.raises(ValueError, match="gives NaN for image 8"):
        score(torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), torch.tensor([0, 0]), torch.tensor([7, 8]))


def test_parts_join_to_the_same_bits_however_dealt() -> None:
    logits, labels, whole = random_scores()
    ids = torch.arange(500)
    parts = [score(logits[i::3], labels[i::3], ids[i::3]) for i in (2, 0, 1)]
    together = joined(parts)
    for name in ("ids", "labels", "classes", "probabilities", "losses"):
        assert np.array_equal(getattr(together, name), getattr(whole, name))
    assert summarised(together, 7) == summarised(whole, 7)


def test_the_same_image_twice_is_a_mistake_of_ours() -> None:
    _, _, scores = random_scores()
    with pytest.raises(AssertionError, match="twice"):
        joined([scores, scores])


def test_excluded_rows_leave() -> None:
    _, _, scores = random_scores()
    assert scores.without(np.array([0, 499])).ids.tolist() == list(range(1, 499))


def test_classes_and_pairs_by_hand() -> None:
    logits = torch.eye(3)[[0, 0, 1, 1, 1, 2]] * torch.tensor([[1.0], [1], [3], [9], [1], [1]])
    labels = torch.tensor([0, 1, 0, 0, 1, 0])
    scores = score(logits, labels, torch.tensor([10, 11, 12, 13, 14, 15]))
    first, second, third = by_class(scores, 3)
    assert (first.images, first.correct, first.predicted) == (4, 1, 2)
    assert (first.accuracy, first.precision) == (0.25, 0.5)
    assert (second.accuracy, second.precision) == (0.5, 1 / 3)
    assert (third.accuracy, third.precision) == (None, 0.0)
    assert [item.index for item in worst_classes([first, second, third], 5)] == [0, 1]
    pairs = confused_pairs(scores, confusion_matrix(scores, 3), 2)
    assert [(pair.label, pair.predicted, pair.ids) for pair in pairs] == [(0, 1, (13, 12)), (0, 2, (15,))]


def test_the_paired_test_counts_disagreements() -> None:
    labels, ids = torch.zeros(10, dtype=torch.int64), torch.arange(10)
    right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    first = score(torch.stack([right] * 4 + [wrong] * 6), labels, ids)
    second = score(torch.stack([wrong] + [right] * 6 + [wrong] * 3), labels, ids)
    result = paired_test(first, second)
    assert (result.only_first, result.only_second) == (1, 3)
    assert result.difference == pytest.approx(0.2)
    assert result.p_value == stats.binomtest(1, 4).pvalue
    spread = 1.959964 * math.sqrt((4 - 4 / 10) / 100)
    assert result.interval == pytest.approx((0.2 - spread, 0.2 + spread), abs=1e-6)


def test_no_image_left_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="no image is left"):
        summarised(joined([]), 3)
