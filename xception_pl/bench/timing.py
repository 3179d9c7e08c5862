"""Alternating turns and their statistics: a busy or throttling machine slows all contenders alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

TURN_SECONDS = 0.3  # a turn lasts at least this long, so that the clock and the change of contender do not count
FEWEST_ROUNDS = 3

Turn = Callable[[int], None]
"""Takes so many steps, and returns when they are done."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` numbers."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median(values), low, high, len(values))


def alternate(turns: Mapping[str, Turn], *, rounds: int, budget: float | None = None) -> dict[str, list[float]]:
    """Seconds a step of each contender: one number a round, A B C A B C …, after a turn that warms up.

    Args:
        turns: The contenders.
        rounds: Turns of each that count.
        budget: Seconds after which no further round begins, once there are three.
    """
    steps = {name: _steps(turn) for name, turn in turns.items()}
    taken: dict[str, list[float]] = {name: [] for name in turns}
    start = time.perf_counter()
    for number in range(rounds):
        if budget is not None and number >= FEWEST_ROUNDS and time.perf_counter() - start > budget:
            break
        for name, turn in turns.items():
            if steps[name] > 1:
                turn(1)  # the caches hold what the contender before left there
            taken[name].append(_timed(turn, steps[name]))
    return taken


def _steps(turn: Turn) -> int:
    """Steps a turn, so that it lasts long enough; warms up."""
    turn(1)
    return max(1, round(TURN_SECONDS / _timed(turn, 1)))


def _timed(turn: Turn, steps: int) -> float:
    start = time.perf_counter()
    turn(steps)
    return (time.perf_counter() - start) / steps


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> Spread:
    """How many times faster than the reference, round by round."""
    return Spread.of([theirs / ours for ours, theirs in zip(seconds, reference, strict=True)])
