"""The curves of an ablation, as in Figures 9 and 10: by optimiser step, a line a variant, a band from seed to seed."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xception_pl.ablation.file import Ablation
from xception_pl.ablation.runs import State
from xception_pl.ablation.statistics import Row
from xception_pl.durable import durable_write
from xception_pl.run.metrics_csv import read_metrics

METRIC_NAMES = {"val_top1": "top-1", "val_map100": "MAP@100"}
Band = tuple[list[float], list[float], list[float], list[float]]
"""Steps, means, lowest and highest values."""


def band(runs: Sequence[dict[float, float]]) -> Band:
    """Mean, lowest and highest of runs (step to value), at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    values = [[run[step] for run in runs] for step in steps]
    means = [sum(several) / len(several) for several in values]
    return steps, means, [min(several) for several in values], [max(several) for several in values]


def draw_ablation(ablation: Ablation, states: Sequence[State], rows: Sequence[Row], picture: Path) -> None:
    """Draws training loss and held-out score by step, and each seed's final score, of the finished runs."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    seeds = sorted({seed for row in rows for seed in row.finals})
    figure.suptitle(f"{ablation.title}; mean of seeds {', '.join(map(str, seeds))}, band from lowest to highest")
    training, heldout, final = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    score = METRIC_NAMES[ablation.metric]
    for index, row in enumerate(rows):
        color = _color(index, len(rows))
        logged = [
            read_metrics(state.folder / "metrics.csv")
            for cell, state in zip(ablation.cells, states, strict=True)
            if cell.variant == row.variant and state.finished and state.folder is not None
        ]
        for axes, column, scale in ((training, "train_loss", 1.0), (heldout, ablation.metric, 100.0)):
            runs = [{line["step"]: scale * line[column] for line in lines if column in line} for lines in logged]
            steps, means, low, high = band(runs)
            marker = "o" if axes is heldout else None
            axes.plot(steps, means, color=color, marker=marker, markersize=3, linewidth=1.4)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        values = [100 * value for value in row.finals.values()]
        final.plot(values, [index] * len(values), "o", color=color, alpha=0.6, markersize=5)
        final.plot([100 * row.score.mean], [index], "|", color=color, markersize=16, markeredgewidth=2)
    training.set(xlabel="optimiser step", title="training loss")
    heldout.set(xlabel="optimiser step", title=f"held-out {score}, averaged weights, %")
    final.set(xlabel=f"held-out {score}, %", title="at the end: each seed, and the mean")
    _name_variants(final, [row.variant for row in rows])
    for axes in (training, heldout, final):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with durable_write(picture) as file:
        figure.savefig(file, dpi=110, format="png")


def _color(index: int, variants: int) -> tuple[float, float, float, float]:
    return colormaps["tab10"](index) if variants <= 10 else colormaps["viridis"](index / (variants - 1))


def _name_variants(axes: Axes, names: list[str]) -> None:
    """The names stand in their colours on the right panel, where nothing crosses them: it is the legend."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for index, label in enumerate(axes.get_yticklabels()):
        label.set_color(_color(index, len(names)))
