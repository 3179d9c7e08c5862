"""Turns alternate, the first does not count, and ratios are taken round by round."""

import time

import pytest

from xception_pl.bench import timing
from xception_pl.bench.timing import Spread, alternate, ratios


def test_turns_alternate_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    calls: list[str] = []
    turns = {name: lambda steps, name=name: calls.append(name * steps) for name in "ab"}
    seconds = alternate(turns, rounds=3)
    assert calls == ["a", "a", "b", "b", *"ababab"]
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}


def test_short_steps_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 10)  # each timed turn takes a tenth of a second
    taken: list[int] = []
    seconds = alternate({"a": taken.append}, rounds=1)
    assert taken == [1, 1, 1, 3]  # warm, measure, warm again, then 0.3 s worth
    assert seconds["a"] == [pytest.approx(0.1 / 3)]


def test_the_budget_ends_it_after_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.0)
    seconds = alternate({"a": lambda steps: time.sleep(0.001)}, rounds=50, budget=1e-6)
    assert len(seconds["a"]) == 3


def test_ratios_pair_the_rounds() -> None:
    # The machine is twice as slow in the second and third round: the ratio does not notice.
    assert ratios([1.0, 2.0, 2.0], [1.5, 3.0, 3.0]) == Spread(1.5, 1.5, 1.5, 3)


def test_spread_has_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
