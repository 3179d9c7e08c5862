"""From scores to numbers: accuracy with its interval, calibration, confusion, and a paired test. NumPy and the standard library."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from xception_pl.evaluation.scores import Ints, Scores

BINS = 15
"""Of equal width, for calibration: as Guo et al., 2017."""


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927): inside [0, 1], and right near its ends where the normal one is not."""
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low, high = (centre - spread) / (1 + z * z / trials), (centre + spread) / (1 + z * z / trials)
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)  # exactly, whatever was rounded


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Images whose confidence, the largest probability, lies in (low, high]."""

    low: float
    high: float
    images: int
    confidence: float | None
    """Mean confidence; None without images."""
    accuracy: float | None
    """Share of them that are right."""


def reliability(scores: Scores, bins: int = BINS) -> list[Bin]:
    """Confidence against accuracy, a bin of equal width each."""
    confidence, correct = scores.probabilities[:, 0], scores.correct
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for i in range(bins):
        inside = place == i
        count = int(inside.sum())
        found.append(
            Bin(
                low=i / bins,
                high=(i + 1) / bins,
                images=count,
                confidence=math.fsum(confidence[inside]) / count if count else None,
                accuracy=int(correct[inside].sum()) / count if count else None,
            )
        )
    return found


def calibration_error(bins: list[Bin]) -> float:
    """ECE: the distance between confidence and accuracy, averaged over images bin by bin."""
    total = sum(bin.images for bin in bins)
    gaps = [
        bin.images * abs(bin.confidence - bin.accuracy)
        for bin in bins
        if bin.confidence is not None and bin.accuracy is not None
    ]
    return math.fsum(gaps) / total if total else math.nan


def confusion_matrix(scores: Scores, classes: int) -> Ints:
    """(classes, classes) images: rows are labels, columns what was predicted."""
    counts: Ints = np.bincount(scores.labels * classes + scores.predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


@dataclass(frozen=True, kw_only=True)
class OfClass:
    """How one class fared."""

    index: int
    images: int
    correct: int
    predicted: int
    """Images that were taken for it, rightly or not."""
    in_top5: int

    @property
    def accuracy(self) -> float | None:
        """Share of its images that are right (recall)."""
        return self.correct / self.images if self.images else None

    @property
    def precision(self) -> float | None:
        """Share of what was taken for it that is."""
        return self.correct / self.predicted if self.predicted else None


def by_class(scores: Scores, classes: int) -> list[OfClass]:
    """One entry a class, in their order."""

    def counted(values: npt.NDArray[np.int64]) -> list[int]:
        return [int(count) for count in np.bincount(values, minlength=classes)]

    rows = zip(
        counted(scores.labels),
        counted(scores.labels[scores.correct]),
        counted(scores.predicted),
        counted(scores.labels[scores.in_top]),
        strict=True,
    )
    return [
        OfClass(index=index, images=images, correct=correct, predicted=predicted, in_top5=in_top5)
        for index, (images, correct, predicted, in_top5) in enumerate(rows)
    ]


def worst_classes(of_classes: list[OfClass], count: int) -> list[OfClass]:
    """The classes with images and the lowest accuracy; among equals the one with more images first."""
    present = [item for item in of_classes if item.images]
    return sorted(present, key=lambda item: (item.correct / item.images, -item.images, item.index))[:count]


@dataclass(frozen=True, kw_only=True)
class Confused:
    """Images of one class that were taken for another."""

    label: int
    predicted: int
    images: int
    ids: tuple[int, ...]
    """Their rows, the most confident mistake first."""


def confused_pairs(scores: Scores, confusion: Ints, count: int) -> list[Confused]:
    """The most frequent mistakes."""
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:count]
    pairs = []
    for label, predicted in zip(*np.unravel_index(order, mistakes.shape), strict=True):
        if mistakes[label, predicted] == 0:
            break
        rows = np.flatnonzero((scores.labels == label) & (scores.predicted == predicted))
        rows = rows[np.argsort(-scores.probabilities[rows, 0], kind="stable")]
        pairs.append(
            Confused(
                label=int(label), predicted=int(predicted), images=len(rows), ids=tuple(map(int, scores.ids[rows]))
            )
        )
    return pairs


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two networks on the same images. The images on which both are right, or both wrong, say nothing about which is better."""

    only_first: int
    """Images that only the first has right."""
    only_second: int
    difference: float
    """Top-1 of the second less that of the first."""
    interval: tuple[float, float]
    """95 % interval of the difference (Wald's, for paired proportions)."""
    p_value: float
    """McNemar's exact test, two-sided: how often two equally good networks differ at least so much."""


def paired_test(first: Scores, second: Scores) -> Paired:
    """Compares top-1 on the same images, image by image."""
    assert np.array_equal(first.ids, second.ids), "a paired test needs the same images"
    images = len(first)
    b = int((first.correct & ~second.correct).sum())
    c = int((second.correct & ~first.correct).sum())
    difference = (c - b) / images if images else 0.0
    spread = 0.0
    if images:
        variance = (b + c - (b - c) ** 2 / images) / images**2
        spread = NormalDist().inv_cdf(0.975) * math.sqrt(max(variance, 0.0))
    return Paired(
        only_first=b,
        only_second=c,
        difference=difference,
        interval=(difference - spread, difference + spread),
        p_value=mcnemar_exact(b, c),
    )


def mcnemar_exact(b: int, c: int) -> float:
    """Twice the tail of Binomial(b + c, 1/2) at the smaller count, at most 1; summed in whole numbers, so exact at any size."""
    trials = b + c
    term = tail = 1
    for k in range(1, min(b, c) + 1):
        term = term * (trials - k + 1) // k
        tail += term
    return min(1.0, float(2 * tail / 2**trials))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of one network on one split."""

    images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    loss: float
    """Mean cross-entropy, nats."""
    ece: float
    reliability: list[Bin]
    classes: list[OfClass]


def summarised(scores: Scores, classes: int) -> Summary:
    """All numbers but the confusion matrix.

    Raises:
        ValueError: there is no image.
    """
    images = len(scores)
    if not images:
        raise ValueError("no image is left to evaluate: all are excluded or cannot be decoded")
    correct = int(scores.correct.sum())
    bins = reliability(scores)
    return Summary(
        images=images,
        top1=correct / images,
        top1_interval=wilson_interval(correct, images),
        top5=int(scores.in_top.sum()) / images,
        loss=math.fsum(scores.losses) / images,
        ece=calibration_error(bins),
        reliability=bins,
        classes=by_class(scores, classes),
    )
