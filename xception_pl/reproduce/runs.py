"""Finished runs, and which of them ran a shipped recipe."""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import yaml

from xception_pl.ablation.statistics import step_seconds
from xception_pl.recipe import Recipe, RecipeError, flat, load_recipe, recipe_from_plain, to_plain
from xception_pl.run.decides import what_decides
from xception_pl.run.folder import read_starts
from xception_pl.run.numbers import read_results


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    folder: str
    settings: dict[str, Any]
    """Dotted keys of its resolved recipe."""
    results: dict[str, float]
    """Of `results.json`, and `steps_per_second`: the median over the logged windows, where there are several."""

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A run that is not counted, and why."""

    folder: str
    reason: str
    results: dict[str, float]


def find_runs(folders: list[str]) -> list[Path]:
    """The run folders among `folders` and below them.

    Raises:
        ValueError: one of them holds no run.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = sorted(path.parent for path in Path(folder).rglob("recipe.yaml"))
        if not runs:
            raise ValueError(f"There is no run in {folder}: give a folder with recipe.yaml in it or below it.")
        found |= dict.fromkeys(runs)
    return list(found)


def read_run(folder: Path) -> Run | Refused:
    """The run in a folder, or why it cannot be read."""
    try:
        recipe = recipe_from_plain(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
        settings = flat(to_plain(recipe))
    except (RecipeError, yaml.YAMLError, AttributeError) as error:
        return Refused(
            folder=str(folder), reason=f"its recipe cannot be read: {' '.join(str(error).split())}", results={}
        )
    changed = {key: how for start in read_starts(folder) for key, how in what_decides(start["changed"]).items()}
    if changed:
        reason = f"its recipe changed midway: {', '.join(f'{key} {how}' for key, how in changed.items())}"
        return Refused(folder=str(folder), reason=reason, results={})
    try:
        results = read_results(folder)
    except FileNotFoundError:
        return Refused(folder=str(folder), reason="not finished", results={})
    except json.JSONDecodeError as error:
        return Refused(folder=str(folder), reason=f"its results cannot be read: {error}", results={})
    if (folder / "metrics.csv").is_file():  # results hold the speed of the last window alone
        seconds = step_seconds(folder, settings["data.global_batch"])
        results |= {"steps_per_second": 1 / median(seconds)} if seconds else {}
    return Run(folder=str(folder), settings=settings, results=results)


def shipped_recipe(path: str) -> Recipe:
    """A shipped recipe, resolved."""
    # Reading a recipe checks that runs can be written; a ledger writes none.
    return load_recipe(path, {"run.folder": tempfile.gettempdir()})


def differing(ours: dict[str, Any], shipped: dict[str, Any]) -> list[str]:
    """Keys in which a run differs from a recipe, of those that decide its numbers; runs of a recipe may differ in seed."""
    decisive = what_decides(shipped)
    return [key for key, value in decisive.items() if key != "seed" and ours.get(key) != value]


def sort_runs(folders: list[str], recipes: dict[str, dict[str, Any]]) -> tuple[dict[str, list[Run]], list[Refused]]:
    """Runs by recipe, one a seed, and those that are not counted.

    Args:
        folders: run folders, or folders above them.
        recipes: dotted keys of each shipped recipe, by its path.
    """
    counted: dict[str, list[Run]] = {path: [] for path in recipes}
    refused: list[Refused] = []
    for folder in find_runs(folders):
        run = read_run(folder)
        if isinstance(run, Refused):
            refused.append(run)
            continue
        differences = {path: differing(run.settings, settings) for path, settings in recipes.items()}
        path = min(differences, key=lambda name: len(differences[name]))
        if differences[path]:
            reason = f"other recipe: differs from {path} in {', '.join(differences[path])}"
        elif run.seed in {other.seed for other in counted[path]}:
            reason = f"{path} with seed {run.seed} is counted already"
        else:
            counted[path].append(run)
            continue
        refused.append(Refused(folder=run.folder, reason=reason, results=run.results))
    return counted, refused


def summary(runs: list[Run], metric: str, scale: float) -> dict[str, Any] | None:
    """Mean, standard deviation (of the sample; None for one run), n and seeds of a metric; None where no run has it."""
    values = {run.seed: run.results[metric] * scale for run in runs if math.isfinite(run.results.get(metric, math.nan))}
    if not values:
        return None
    spread = stdev(values.values()) if len(values) > 1 else None
    return {"mean": mean(values.values()), "sd": spread, "n": len(values), "seeds": sorted(values)}
