"""The plan: every image once, in an order that only data, seed, epoch and global batch decide."""

import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xception_pl.data.plan import EpochPlan, EvalPlan, image_seeds, lanes, per_device_batch

IMAGENET = 1_281_167


@st.composite
def plans(draw: st.DrawFn) -> EpochPlan:
    rows = draw(st.lists(st.integers(0, 40), min_size=1, max_size=60))
    batch = draw(st.integers(1, 64))
    assume(sum(rows) >= batch)
    return EpochPlan(
        rows,
        seed=draw(st.integers(0, 9)),
        epoch=draw(st.integers(0, 3)),
        global_batch=batch,
        window=draw(st.integers(1, 600)),
    )


@given(plans())
@settings(max_examples=150, deadline=None)
def test_an_epoch_is_every_image_once_but_the_dropped_ones(plan: EpochPlan) -> None:
    order = plan.order()
    assert order.shape == (plan.images // plan.global_batch, plan.global_batch)
    assert len(np.unique(order)) == order.size == plan.images - plan.dropped
    assert order.min() >= 0
    assert order.max() < plan.images
    assert plan.dropped < plan.global_batch


@given(plans(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_batch_and_any_cut_of_it_equal_the_order(plan: EpochPlan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, plan.steps - 1))
    divisors = [n for n in range(1, 65) if plan.global_batch % n == 0]
    world = data.draw(st.sampled_from(divisors))
    parts = data.draw(st.sampled_from([n for n in divisors if plan.global_batch // world % n == 0]))
    whole = plan.order()[step]
    assert np.array_equal(plan.batch(step), whole)
    cut = [plan.micro_batch(step, rank, world, part, parts) for rank in range(world) for part in range(parts)]
    assert np.array_equal(np.concatenate(cut), whole)


@given(plans(), st.data())
@settings(max_examples=80, deadline=None)
def test_the_row_groups_announced_are_those_read(plan: EpochPlan, data: st.DataObject) -> None:
    world = data.draw(st.sampled_from([n for n in range(1, 65) if plan.global_batch % n == 0]))
    rank = data.draw(st.integers(0, world - 1))
    step = data.draw(st.integers(0, plan.steps - 1))
    announced, before = plan.groups_needed(step, rank, world)
    assert len(set(announced.tolist())) == len(announced)
    assert (np.diff(before) >= 0).all()
    starts = np.cumsum(plan.rows) - plan.rows
    need = dict(zip(announced.tolist(), before.tolist(), strict=True))
    for s in range(step, plan.steps):
        groups = np.searchsorted(starts + plan.rows, plan.micro_batch(s, rank, world), side="right")
        assert all(need[group] <= s for group in groups.tolist())


def test_orders_differ_between_epochs_and_seeds_and_repeat_for_equal_ones() -> None:
    def order(seed: int, epoch: int) -> np.ndarray:
        return EpochPlan([10] * 50, seed=seed, epoch=epoch, global_batch=20, window=100).order()

    assert np.array_equal(order(1, 2), order(1, 2))
    assert not np.array_equal(order(1, 2), order(1, 3))
    assert not np.array_equal(order(1, 2), order(2, 2))


def test_what_is_dropped_changes_from_epoch_to_epoch() -> None:
    left = []
    for epoch in range(2):
        plan = EpochPlan([10] * 51, seed=0, epoch=epoch, global_batch=100)
        assert plan.dropped == 10
        left.append(set(range(510)) - set(plan.order().flatten().tolist()))
    assert left[0] != left[1]


def test_imagenet_is_planned_in_seconds() -> None:
    rows = [100] * (IMAGENET // 100) + [IMAGENET % 100]
    taken = []
    for _ in range(3):  # 0.13 s each where nothing else runs
        start = time.perf_counter()
        plan = EpochPlan(rows, seed=0, epoch=0, global_batch=256)
        order = plan.order()
        taken.append(time.perf_counter() - start)
    assert min(taken) < 3
    assert (plan.steps, plan.dropped) == (5004, 143)
    assert len(np.unique(order)) == 5004 * 256


@pytest.mark.parametrize("step", [0, 50, 4500, 5003])
def test_a_batch_costs_at_most_two_blocks_a_lane_however_late(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = []
    original = EpochPlan._block_ids

    def counted(plan: EpochPlan, lane: int, block: int) -> np.ndarray:
        ids = original(plan, lane, block)
        shuffled.append(len(ids))
        return ids

    monkeypatch.setattr(EpochPlan, "_block_ids", counted)
    plan = EpochPlan([100] * 12812, seed=0, epoch=0, global_batch=256, window=16384)
    plan.batch(step)
    assert plan.steps == 5004
    assert 0 < sum(shuffled) <= 2 * 16384


def test_an_epoch_of_imagenet_begins_with_few_row_groups_and_goes_on_with_few_at_a_time() -> None:
    """What a cold cache must fetch before the first step, and then while training goes on."""
    plan = EpochPlan([100] * 12811 + [67], seed=0, epoch=0, global_batch=256)
    assert plan.lanes == 64
    before = plan.groups_needed(0, 0, 1)[1]
    new = np.bincount(before, minlength=plan.steps)
    assert new[0] <= plan.lanes + 8
    assert new[1:200].max() <= 24
    assert new[:200].sum() <= 900  # the window is 655 row groups; 200 steps read 512 new ones' images at least
    assert new[1000:4000].mean() == pytest.approx(2.56, rel=0.05)


def test_a_small_set_in_few_large_row_groups_begins_with_all_of_the_window() -> None:
    """Sorted by class, one row group at a time would be one class at a time."""
    plan = EpochPlan([1000] * 40, seed=0, epoch=0, global_batch=32, window=20_000)
    assert len(np.unique(plan.batch(0) // 1000)) > 12


@pytest.mark.parametrize("world", [2, 4, 8, 16, 20, 40, 80])
def test_ranks_share_no_row_group_but_at_the_ends_of_lanes(world: int) -> None:
    plan = EpochPlan([100] * 12812, seed=0, epoch=0, global_batch=6400, window=16384)
    assert plan.lanes == 80
    read = sum(len(plan.groups_needed(0, rank, world)[0]) for rank in range(world))
    # a rank's slice meets whole lanes where world divides them; elsewhere a lane's row groups are read by two or three
    shared = 0 if plan.lanes % world == 0 else 12812 * (world - 1) / plan.lanes
    assert read <= 12812 + shared + plan.lanes


def test_sorted_classes_are_mixed_as_a_perfect_shuffle_mixes_them() -> None:
    """1,000 classes in sorted order: the distinct classes of a batch of 256, against drawing at random."""
    rows, classes = [100] * 1000, np.repeat(np.arange(1000), 100)
    order = EpochPlan(rows, seed=0, epoch=0, global_batch=256, window=16384).order()
    ours = np.mean([len(np.unique(classes[ids])) for ids in order])
    perfect = np.mean(
        [
            len(np.unique(classes[ids]))
            for ids in np.random.default_rng(0).permutation(100_000)[: order.size].reshape(order.shape)
        ]
    )
    assert ours > 0.6 * perfect


def test_a_window_that_holds_the_data_shuffles_it_perfectly() -> None:
    """Each image is as likely at each place: the mean place of the first image over many seeds is the middle."""
    places = [
        np.flatnonzero(EpochPlan([7] * 20, seed=s, epoch=0, global_batch=20, window=140).order().ravel() == 0)[0]
        for s in range(400)
    ]
    assert abs(np.mean(places) - 69.5) < 3 * 40.4 / 20
    assert lanes(np.full(20, 7), 20, 140) == 1


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 40))
def test_evaluation_counts_each_image_once_in_equal_steps(images: int, world: int, batch: int) -> None:
    ranks = [EvalPlan(images, batch=batch, rank=rank, world=world) for rank in range(world)]
    assert len({plan.steps for plan in ranks}) == 1
    counted = []
    for plan in ranks:
        for step in range(plan.steps):
            ids, valid = plan.batch(step)
            assert len(ids) == batch
            assert ids.min() >= 0
            assert ids.max() < images
            counted += ids[valid].tolist()
    assert counted == list(range(images))


@pytest.mark.parametrize(
    ("global_batch", "world", "accumulate", "near"), [(256, 3, 1, "255 or 258"), (10, 4, 2, "8 or 16"), (3, 4, 1, "4")]
)
def test_a_batch_that_does_not_divide_is_refused_with_all_numbers(
    global_batch: int, world: int, accumulate: int, near: str
) -> None:
    with pytest.raises(ValueError, match=near) as error:
        per_device_batch(global_batch, world, accumulate)
    assert all(str(number) in str(error.value) for number in (global_batch, world, accumulate))


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="5 images, fewer than one global batch of 8"):
        EpochPlan([5], seed=0, epoch=0, global_batch=8)


def test_image_seeds_depend_on_seed_epoch_and_row_alone() -> None:
    ids = np.arange(10_000)
    seeds = image_seeds(1, 2, ids)
    assert np.array_equal(image_seeds(1, 2, ids[::-1]), seeds[::-1])
    assert len(np.unique(np.concatenate([seeds, image_seeds(1, 3, ids), image_seeds(2, 2, ids)]))) == 30_000
    assert seeds.min() >= 0
    assert abs(np.mean(seeds / 2**63) - 0.5) < 0.02
