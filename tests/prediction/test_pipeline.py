"""From files to outcomes: in order, bad ones named, each the same as alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.prediction.conftest import shipped
from xception_pl.data.decode import eval_image
from xception_pl.prediction.pictures import Picture, find_pictures
from xception_pl.prediction.pipeline import Outcome, Output, chained, outcomes
from xception_pl.weights.ready import Prepare

CPU = torch.device("cpu")
SEEN: list[int] = []


class Means(nn.Module):
    """Logits that can be computed by hand: the channels' means, and how many images there were is noted."""

    def forward(self, images: Tensor) -> Output:
        SEEN.append(len(images))
        means = images.mean((2, 3))
        return Output(means, features=means * 2)


def run(folder: Path, **options: object) -> list[Outcome]:
    SEEN.clear()
    pictures = chained(find_pictures([str(folder)]))
    prepare = Prepare(71, "resize", 3)
    return list(outcomes(pictures, prepare, Means(), device=CPU, **options))  # type: ignore[arg-type]


def test_outcomes_come_in_order_and_name_what_is_bad(folder: Path) -> None:
    found = run(folder, batch=2)
    assert [Path(outcome.name).name for outcome in found] == [
        "a.jpg",
        "b.JPEG",
        "c.png",
        "d.jpg",
        "e.jpg",
        "f.png",
        "g.png",
    ]
    problems = {Path(outcome.name).name: outcome.problem for outcome in found if outcome.problem}
    assert set(problems) == {"d.jpg", "e.jpg", "f.png"}
    assert "18 bytes cannot be read: they are no image of a known format" in (problems["d.jpg"] or "")
    assert SEEN == [2, 2]


def test_results_are_those_of_the_image_by_hand(folder: Path) -> None:
    prepare = Prepare(71, "resize", 3)
    for outcome in run(folder, batch=3, top=2):
        if outcome.problem:
            continue
        pixels = torch.from_numpy(eval_image(Path(outcome.name).read_bytes(), prepare.config)).float()
        means = (pixels / 127.5 - 1).mean((0, 1))
        expected = means.softmax(0).sort(descending=True, stable=True)
        assert outcome.classes == tuple(expected.indices[:2].tolist())
        assert outcome.probabilities == pytest.approx(expected.values[:2].tolist(), abs=1e-5)
        assert outcome.features == pytest.approx((means * 2).tolist(), abs=1e-5)


@pytest.mark.parametrize(("batch", "workers"), [(1, 1), (2, 3), (64, 8)])
def test_neither_batch_nor_workers_change_a_result(folder: Path, batch: int, workers: int) -> None:
    reference = run(folder, batch=4, workers=2)
    for one, other in zip(run(folder, batch=batch, workers=workers), reference, strict=True):
        assert (one.name, one.problem, one.classes) == (other.name, other.problem, other.classes)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_filled_batches_have_one_size(folder: Path) -> None:
    found = run(folder, batch=3, fill=True)
    assert SEEN == [3, 3]
    assert len([outcome for outcome in found if outcome.problem is None]) == 4


def test_missing_files_are_outcomes(tmp_path: Path) -> None:
    found = outcomes([Picture("gone", (tmp_path / "gone").read_bytes)], Prepare(71, "resize", 3), Means(), device=CPU)
    assert [outcome.problem for outcome in found] == ["there is no such file"]


@pytest.mark.parametrize("data", [shipped(0), b"junk"])
def test_no_more_is_read_than_is_needed_soon(data: bytes) -> None:
    taken = 0

    def endless() -> Iterator[Picture]:
        nonlocal taken
        while True:
            taken += 1
            yield Picture(str(taken), lambda: data)

    found = outcomes(endless(), Prepare(71, "resize", 3), Means(), device=CPU, batch=2)
    assert next(found).name == "1"
    assert taken <= 2 * 3 + 2
    found.close()  # type: ignore[attr-defined]
