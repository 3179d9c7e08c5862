"""MAP@k with class weights against a plain reference: by hand, at random, adversarial, and over processes."""

import math
import pickle
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from xception_pl.metrics import MeanAveragePrecisionAtK


def plain(
    scores: Sequence[Sequence[float]], labels: Sequence[set[int]], weights: Sequence[int] | None, k: int
) -> float:
    """The definition, in exact fractions and loops."""
    gained, possible = Fraction(0), Fraction(0)
    for row, positives in zip(scores, labels, strict=True):
        if not positives:
            continue
        weight = {c: Fraction(1 if weights is None else weights[c]) for c in positives}
        ranked = sorted(range(len(row)), key=lambda c: (-row[c] if row[c] == row[c] else math.inf, c))
        n, hits = min(len(positives), k), 0
        for rank, c in enumerate(ranked[:k], start=1):
            if c in positives:
                hits += 1
                gained += weight[c] * Fraction(hits, rank) / n
        possible += sum(sorted(weight.values(), reverse=True)[:k]) / n
    return float(gained / possible) if possible else math.nan


def targets_of(labels: Sequence[set[int]], classes: int) -> torch.Tensor:
    targets = torch.zeros(len(labels), classes, dtype=torch.int64)
    for row, positives in zip(targets, labels, strict=True):
        row[list(positives)] = 1
    return targets


def measured(
    scores: Sequence[Sequence[float]], labels: Sequence[set[int]], weights: Sequence[float] | None = None, k: int = 100
) -> float:
    metric = MeanAveragePrecisionAtK(weights, k=k)
    metric.update(torch.tensor(scores, dtype=torch.float64), targets_of(labels, len(scores[0])))
    return float(metric.compute())


def test_by_hand() -> None:
    """Positives at ranks 1 and 3: precisions 1 and 2/3."""
    assert measured([[4.0, 3.0, 2.0, 1.0]], [{0, 2}]) == pytest.approx((1 + 2 / 3) / 2, rel=1e-15)


def test_by_hand_with_weights() -> None:
    """The same, the second one three times as common."""
    assert measured([[4.0, 3.0, 2.0, 1.0]], [{0, 2}], [1, 9, 3, 9]) == pytest.approx((1 + 3 * 2 / 3) / 4, rel=1e-15)


def test_weights_act_between_images() -> None:
    """A common class that is found and a rare one at rank 2."""
    scores, labels = [[2.0, 1.0], [2.0, 1.0]], [{0}, {1}]
    assert measured(scores, labels) == pytest.approx((1 + 1 / 2) / 2, rel=1e-15)
    assert measured(scores, labels, [4, 1]) == pytest.approx((4 * 1 + 1 * 1 / 2) / 5, rel=1e-15)


def test_only_ratios_of_weights_matter() -> None:
    scores, labels = [[3.0, 2.0, 1.0]], [{0, 2}]
    assert measured(scores, labels, [7.0, 7.0, 7.0]) == pytest.approx(measured(scores, labels), rel=1e-15)
    assert measured(scores, labels, [0.1, 0.2, 0.3]) == pytest.approx(measured(scores, labels, [10, 20, 30]), rel=1e-14)


def test_a_positive_beyond_rank_k_gains_nothing() -> None:
    scores = [[-float(c) for c in range(150)]]
    assert measured(scores, [{0, 99}]) == pytest.approx((1 + 2 / 100) / 2, rel=1e-15)
    assert measured(scores, [{0, 100}]) == pytest.approx(1 / 2, rel=1e-15)
    assert measured(scores, [{100}]) == 0.0


def test_more_than_k_positives_can_still_be_perfect() -> None:
    scores = [[-float(c) for c in range(150)]]
    assert measured(scores, [set(range(120))]) == 1.0
    assert measured(scores, [set(range(150))]) == 1.0
    heavy_last = [1.0] * 110 + [2.0] * 10 + [0.0] * 30  # the first 100 leave out the ten that weigh most
    assert measured(scores, [set(range(120))], heavy_last) == pytest.approx(100 / (90 + 20), rel=1e-15)


def test_fewer_than_k_classes() -> None:
    assert measured([[1.0, 2.0, 3.0]], [{0}]) == pytest.approx(1 / 3, rel=1e-15)
    assert measured([[1.0]], [{0}]) == 1.0


def test_images_without_a_positive_do_not_count() -> None:
    assert measured([[2.0, 1.0], [2.0, 1.0]], [{1}, set()]) == 0.5
    assert measured([[2.0, 1.0], [2.0, 1.0]], [{1}, {0}], [0.0, 1.0]) == 0.5


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_to_average_is_nan() -> None:
    assert math.isnan(measured([[2.0, 1.0]], [set()]))
    assert math.isnan(float(MeanAveragePrecisionAtK().compute()))
    metric = MeanAveragePrecisionAtK()
    metric.update(torch.zeros(0, 5), torch.zeros(0, 5))
    assert math.isnan(float(metric.compute()))


def test_ties_rank_by_class_index() -> None:
    assert measured([[1.0, 1.0, 1.0]], [{0}]) == 1.0
    assert measured([[1.0, 1.0, 1.0]], [{2}]) == pytest.approx(1 / 3, rel=1e-15)
    scores = [[0.0] * 5000]
    assert measured(scores, [{99}]) == pytest.approx(1 / 100, rel=1e-15)
    assert measured(scores, [{100}]) == 0.0


def test_infinite_scores_and_nan() -> None:
    inf, nan = math.inf, math.nan
    assert measured([[nan, -inf, 5.0, inf]], [{3}]) == 1.0
    assert measured([[nan, 0.0, nan, 1.0]], [{2}]) == pytest.approx(1 / 4, rel=1e-15)


cases = st.integers(1, 12).flatmap(
    lambda classes: st.tuples(
        st.lists(
            st.tuples(
                st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, math.inf]), min_size=classes, max_size=classes),
                st.sets(st.integers(0, classes - 1)),
            ),
            min_size=1,
            max_size=6,
        ),
        st.none() | st.lists(st.integers(0, 3), min_size=classes, max_size=classes).filter(any),
        st.integers(1, 15),
    )
)


@settings(deadline=None)
@given(cases)
def test_small_cases_full_of_ties(case: tuple[list[tuple[list[float], set[int]]], list[int] | None, int]) -> None:
    images, weights, k = case
    scores, labels = [s for s, _ in images], [positives for _, positives in images]
    assert measured(scores, labels, weights, k) == pytest.approx(
        plain(scores, labels, weights, k), rel=1e-12, nan_ok=True
    )


@pytest.mark.parametrize("classes", [30, 100, 101, 400])
@pytest.mark.parametrize("weighted", [False, True])
def test_random_batches(classes: int, weighted: bool) -> None:
    draw = random.Random(classes)
    scores = [[draw.choice([draw.gauss(0, 1), 0.25, -0.25]) for _ in range(classes)] for _ in range(40)]
    labels = [set(draw.sample(range(classes), draw.randrange(classes + 1))) for _ in range(40)]
    weights = [draw.randrange(50) for _ in range(classes)] if weighted else None
    metric = MeanAveragePrecisionAtK(weights)
    for start in range(0, 40, 7):  # batches of 7, the last of 5
        metric.update(torch.tensor(scores[start : start + 7]).double(), targets_of(labels[start : start + 7], classes))
    assert float(metric.compute()) == pytest.approx(plain(scores, labels, weights, 100), rel=1e-12)


def test_targets_of_any_type_and_scores_of_half_precision() -> None:
    scores, targets = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[1, 0, 1, 0]])
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        for score_dtype in (torch.float32, torch.bfloat16, torch.float16):
            metric = MeanAveragePrecisionAtK([1.0, 1.0, 3.0, 1.0])
            metric.update(scores.to(score_dtype), targets.to(dtype))
            assert float(metric.compute()) == pytest.approx(3 / 4, rel=1e-15)


def test_a_module_of_low_precision_does_not_round_the_metric() -> None:
    scores, labels, weights = [[4.0, 3.0, 2.0, 1.0]] * 300, [{0, 2}, {1}, {3, 2}] * 100, [1.1, 1.2, 1.3, 1.4]
    module = torch.nn.ModuleList([MeanAveragePrecisionAtK(weights)]).to(torch.bfloat16)
    for start in range(0, 300, 3):
        module[0].update(torch.tensor(scores[start : start + 3]), targets_of(labels[start : start + 3], 4))
    assert float(module[0].compute()) == pytest.approx(measured(scores, labels, weights), rel=1e-13)


def test_state_survives_pickling_and_reset_forgets() -> None:
    metric = MeanAveragePrecisionAtK([1.0, 2.0])
    metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 0]]))
    again = pickle.loads(pickle.dumps(metric))
    assert float(again.compute()) == 0.5
    assert metric.state_dict() == {}  # nothing of it in a checkpoint
    metric.reset()
    metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 1]]))
    assert float(metric.compute()) == 1.0


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [math.inf, 1.0], []])
def test_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="class weights"):
        MeanAveragePrecisionAtK(weights)


def test_impossible_k() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        MeanAveragePrecisionAtK(k=0)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        MeanAveragePrecisionAtK().update(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(3,\) and \(3,\)"):
        MeanAveragePrecisionAtK().update(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="2 class weights for 3 classes"):
        MeanAveragePrecisionAtK([1.0, 1.0]).update(torch.zeros(2, 3), torch.zeros(2, 3))


def drawn_batch(images: slice) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(23, 150, generator=generator).round(decimals=1)  # with ties
    targets = torch.rand(23, 150, generator=generator) < 0.1
    targets[5] = False
    return scores[images], targets[images]


WEIGHTS = [1.0 + c % 7 for c in range(150)]


def one_of_two(rank: int, folder: str) -> None:
    """Process 0 sees 16 images in two batches, process 1 the other 7, and a batch of none."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metric = MeanAveragePrecisionAtK(WEIGHTS)
    for images in ((slice(0, 4), slice(4, 16)), (slice(16, 23), slice(23, 23)))[rank]:
        metric.update(*drawn_batch(images))
    Path(folder, f"value{rank}").write_text(repr(float(metric.compute())))
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    alone = MeanAveragePrecisionAtK(WEIGHTS)
    alone.update(*drawn_batch(slice(None)))
    values: list[Any] = [float(Path(tmp_path, f"value{rank}").read_text()) for rank in (0, 1)]
    assert values[0] == values[1]
    assert values[0] == pytest.approx(float(alone.compute()), rel=1e-14)
