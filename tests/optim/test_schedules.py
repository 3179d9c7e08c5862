"""Each step's learning rate, exactly."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xception_pl.optim.config import OptimConfig
from xception_pl.optim.schedules import learning_rate


def rates(config: OptimConfig, steps: int, *, images_per_epoch: int = 100, global_batch: int = 10) -> list[float]:
    return [
        learning_rate(config, step, images_per_epoch=images_per_epoch, global_batch=global_batch, total_steps=steps)
        for step in range(steps)
    ]


def test_paper_imagenet_stairs() -> None:
    """0.045, times 0.94 every 2 epochs, of 1,281,167 images in batches of 256: stairs of 10,009 steps."""
    at = {0: 0, 10_008: 0, 10_009: 1, 20_017: 1, 20_018: 2, 500_450: 50}
    for step, stairs in at.items():
        rate = learning_rate(OptimConfig(), step, images_per_epoch=1_281_167, global_batch=256, total_steps=10**6)
        assert rate == 0.045 * 0.94**stairs


def test_stairs_by_epochs() -> None:
    config = OptimConfig(lr=1.0, decay_rate=0.5, decay_every_epochs=0.35)  # 3.5 steps, of which TF-Slim takes 3
    assert rates(config, 8) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]


@given(st.integers(1, 10**5), st.integers(1, 2048), st.integers(1, 40))
def test_a_stair_of_whole_epochs_is_never_rounded_to_a_step_less(batches: int, batch: int, epochs: int) -> None:
    config = OptimConfig(decay_every_epochs=float(epochs))
    last, first = (
        learning_rate(config, step, images_per_epoch=batches * batch, global_batch=batch, total_steps=0)
        for step in (batches * epochs - 1, batches * epochs)
    )
    assert (last, first) == (0.045, 0.045 * 0.94)


def test_paper_jft_stairs() -> None:
    """0.001, times 0.9 every 3,000,000 samples: in batches of 1,920 that is 1562.5 steps: stairs of 1563 and 1562."""
    config = OptimConfig(lr=0.001, decay_rate=0.9, decay_every_epochs=0.0, decay_every_samples=3_000_000)
    at = {0: 0, 1562: 0, 1563: 1, 3124: 1, 3125: 2, 4687: 2, 4688: 3, 15_625: 10}
    for step, stairs in at.items():
        rate = learning_rate(config, step, images_per_epoch=350_000_000, global_batch=1920, total_steps=10**6)
        assert rate == 0.001 * 0.9**stairs


@given(st.integers(0, 10**9), st.integers(1, 10**4), st.integers(1, 10**7))
def test_stairs_by_samples_fall_where_the_samples_say(step: int, batch: int, every: int) -> None:
    config = OptimConfig(lr=1.0, decay_rate=0.999, decay_every_epochs=0.0, decay_every_samples=every)
    rate = learning_rate(config, step, images_per_epoch=1, global_batch=batch, total_steps=1)
    assert rate == 0.999 ** math.floor(Fraction(step * batch, every))


def test_stairs_by_samples_may_be_shorter_than_a_step() -> None:
    config = OptimConfig(lr=1.0, decay_rate=0.5, decay_every_epochs=0.0, decay_every_samples=4)
    assert rates(config, 4) == [1.0, 0.5**2, 0.5**5, 0.5**7]


def test_warm_up_rises_in_equal_steps_to_lr_and_the_stairs_follow() -> None:
    config = OptimConfig(lr=1.0, warmup_epochs=0.4, decay_rate=0.5, decay_every_epochs=0.2)
    assert rates(config, 9) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_warm_up_before_stairs_by_samples() -> None:
    config = OptimConfig(lr=1.0, warmup_epochs=0.2, decay_rate=0.5, decay_every_epochs=0.0, decay_every_samples=20)
    assert rates(config, 7) == [0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_cosine_starts_at_lr_and_reaches_final_lr_after_the_last_step() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", final_lr=0.2)
    assert rates(config, 4) == pytest.approx(
        [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)], rel=1e-15
    )
    after = [learning_rate(config, s, images_per_epoch=100, global_batch=10, total_steps=4) for s in (4, 5, 100)]
    assert after == [0.2, 0.2, 0.2]


def test_cosine_after_warm_up_takes_what_steps_are_left() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_epochs=0.2)
    assert rates(config, 6) == pytest.approx(
        [0.5, 1.0, 1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2], rel=1e-15
    )


def test_a_run_that_ends_in_its_warm_up_only_warms_up() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_epochs=1.0)
    assert rates(config, 3) == [0.1, 0.2, 0.3]


def test_constant() -> None:
    assert rates(OptimConfig(lr=0.3, schedule="constant"), 50) == [0.3] * 50


def test_the_rate_depends_on_images_not_on_how_a_batch_is_split() -> None:
    """Doubling the global batch halves the steps of a stair: the same images at the same rate."""
    config = OptimConfig(decay_every_epochs=1.0)
    small, large = rates(config, 40, global_batch=10), rates(config, 20, global_batch=20)
    assert small[::2] == large


def test_lr_batch_scales_the_whole_curve_in_proportion() -> None:
    plain = OptimConfig(lr=0.1, final_lr=0.01, schedule="cosine", warmup_epochs=0.2)
    meant_for_five = OptimConfig(lr=0.1, lr_batch=5, final_lr=0.01, schedule="cosine", warmup_epochs=0.2)
    doubled = rates(meant_for_five, 10, global_batch=10)
    assert doubled == pytest.approx([2 * rate for rate in rates(plain, 10, global_batch=10)], rel=1e-15)
    assert rates(meant_for_five, 10, global_batch=5) == rates(plain, 10, global_batch=5)


def test_a_stair_shorter_than_a_step_is_an_error_that_names_both_keys() -> None:
    with pytest.raises(ValueError, match=r"optim\.decay_every_epochs 2\.0 .*data\.global_batch"):
        learning_rate(OptimConfig(), 0, images_per_epoch=100, global_batch=256, total_steps=1)
