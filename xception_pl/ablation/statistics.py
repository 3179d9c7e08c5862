"""An ablation in numbers: each variant's mean and spread over seeds, and its paired difference to the first variant."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from statistics import fmean, median, stdev

from xception_pl.ablation.file import Ablation
from xception_pl.ablation.runs import State
from xception_pl.run.metrics_csv import read_metrics


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Some values of the same quantity, one a seed."""

    mean: float
    deviation: float | None
    """Sample standard deviation (n - 1), of single runs and not of the mean; None for one value."""
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of at least one value; not a number where one is not (a run that diverged)."""
    if len(values) == 1:
        return Spread(mean=values[0], deviation=None, n=1)
    deviation = stdev(values) if all(map(isfinite, values)) else nan  # stdev itself fails on NaN
    return Spread(mean=fmean(values), deviation=deviation, n=len(values))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant with at least one finished run."""

    variant: str
    finals: dict[int, float]
    """Seed to the final held-out score, as a fraction."""
    losses: dict[int, float]
    """Seed to the final held-out loss."""
    differences: dict[int, float]
    """Seed to score less the first variant's with this seed: the same images in the same order. Empty for the first."""
    parameters: int
    step_ms: float | None
    """Median time of an optimiser step over the logged windows of all runs, without each run's first; None for one window."""

    @property
    def score(self) -> Spread:
        return spread(list(self.finals.values()))

    @property
    def loss(self) -> Spread:
        return spread(list(self.losses.values()))

    @property
    def difference(self) -> Spread | None:
        return spread(list(self.differences.values())) if self.differences else None

    @property
    def agreement(self) -> tuple[int, int]:
        """How many differences are above zero, and how many below."""
        return sum(d > 0 for d in self.differences.values()), sum(d < 0 for d in self.differences.values())


def rows(ablation: Ablation, states: Sequence[State]) -> list[Row]:
    """The variants that have a finished run, in the order of the file.

    Args:
        ablation: What was run.
        states: What lies on disk, one a cell; what is not finished is left out.
    """
    finished = {
        (cell.variant, cell.seed): state for cell, state in zip(ablation.cells, states, strict=True) if state.finished
    }
    found = []
    reference: dict[int, float] = {}
    for index, variant in enumerate(ablation.variants):
        runs = {seed: finished[variant, seed] for seed in ablation.seeds if (variant, seed) in finished}
        if not runs:
            continue
        results = {seed: state.results() for seed, state in runs.items()}
        finals = {seed: numbers[ablation.metric] for seed, numbers in results.items()}
        if index == 0:
            reference = finals
        batch = ablation.of_variant(variant)[0].recipe.data.global_batch
        found.append(
            Row(
                variant=variant,
                finals=finals,
                losses={seed: numbers["val_loss"] for seed, numbers in results.items()},
                differences={seed: finals[seed] - reference[seed] for seed in finals if index and seed in reference},
                parameters=int(next(iter(results.values()))["parameters"]),
                step_ms=_step_ms(list(runs.values()), batch),
            )
        )
    return found


def step_seconds(folder: Path, global_batch: int) -> list[float]:
    """Seconds of an optimiser step in each logged window of a run but the first, which warms up."""
    logged = read_metrics(folder / "metrics.csv")
    speeds = [row["images_per_second"] for row in logged if "images_per_second" in row]
    return [global_batch / speed for speed in speeds[1:]]


def _step_ms(runs: list[State], global_batch: int) -> float | None:
    times = []
    for state in runs:
        assert state.folder is not None
        times += step_seconds(state.folder, global_batch)
    return 1000 * median(times) if times else None
