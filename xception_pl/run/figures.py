"""`curves.png`: loss, accuracy and learning rate of a run, from its `metrics.csv`."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xception_pl.durable import durable_write
from xception_pl.run.metrics_csv import read_metrics

_PANELS = {
    "loss": {"train_loss": "training", "val_loss": "held-out, averaged weights"},
    "accuracy": {
        "train_top1": "training top-1",
        "val_top1": "held-out top-1, averaged weights",
        "val_top5": "held-out top-5, averaged weights",
        "train_map100": "training MAP@100",
        "val_map100": "held-out MAP@100, averaged weights",
    },
    "learning rate": {"lr": "learning rate"},
}


def draw_curves(metrics: Path, picture: Path, title: str) -> bool:
    """Draws the curves of a run; False, and no picture, where nothing was logged yet."""
    rows = read_metrics(metrics) if metrics.is_file() else []
    if not rows:
        return False
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, series) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        _panel(axes, name, series, rows)
    with durable_write(picture) as file:
        figure.savefig(file, dpi=110, format="png")
    return True


def _panel(axes: Axes, name: str, series: dict[str, str], rows: list[dict[str, float]]) -> None:
    for column, label in series.items():
        points = [(row["epoch"], row[column]) for row in rows if column in row]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="o" if column.startswith("val_") else None, markersize=4
            )
    axes.set(xlabel="epoch", title=name)
    axes.grid(alpha=0.3)
    if name == "learning rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    elif axes.lines:
        axes.legend(fontsize=8)
