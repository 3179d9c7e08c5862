"""Draws docs/finetuning.png: `python scripts/draw_finetuning.py FINE_TUNED SCRATCH PICTURE`, two folders of finished runs."""

import json
import sys
from pathlib import Path

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def top1(folder: Path) -> dict[int, float]:
    """Held-out top-1 of each finished run, by seed."""
    return {
        yaml.safe_load((results.parent / "recipe.yaml").read_text())["seed"]: json.loads(results.read_text())[
            "val_top1"
        ]
        for results in sorted(folder.glob("*/results.json"))
    }


def main(tuned: Path, scratch: Path, picture: Path) -> None:
    """One line a seed, from training from scratch to fine-tuning; the thick one is their mean."""
    ends = {"from scratch": top1(scratch), "fine-tuned": top1(tuned)}
    seeds = sorted(set.intersection(*map(set, ends.values())))
    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for seed in seeds:
        axes.plot([100 * end[seed] for end in ends.values()], marker="o", alpha=0.6, label=f"seed {seed}")
    axes.plot([100 * sum(end[s] for s in seeds) / len(seeds) for end in ends.values()], "k", linewidth=3, label="mean")
    axes.set(xticks=range(2), xticklabels=list(ends), xlim=(-0.3, 1.3), ylabel="top-1, %", title="10 images a class")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
