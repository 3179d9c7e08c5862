"""The ledger, put together from the claims, the recipes, the networks and finished runs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xception_pl.nets.create import create_network
from xception_pl.recipe import Recipe, flat, to_plain
from xception_pl.reproduce.claims import COUNTS, FIGURES, RESULTS, SETTINGS, WITHOUT_AUXILIARY_TOWER, Figure, Setting
from xception_pl.reproduce.flags import base_of, read_flags
from xception_pl.reproduce.runs import Run, shipped_recipe, sort_runs, summary
from xception_pl.run.numbers import without_nan

Ledger = dict[str, Any]
ABLATIONS = Path(__file__).parents[2] / "docs" / "ablations"
"""The reports of the shipped ablations."""


def make_ledger(folders: list[str]) -> Ledger:
    """Everything that the command prints, in JSON's own types; None for a number that is not finite.

    Raises:
        ValueError: a folder holds no run.
    """
    shipped = {path: shipped_recipe(path) for path in _with_bases(_recipes())}
    settings = {path: flat(to_plain(recipe)) for path, recipe in shipped.items()}
    recipes = {path: settings[path] for path in _recipes()}
    networks = {
        path: _network(shipped[path]) for path in {claim.recipe for claim in COUNTS} | {*WITHOUT_AUXILIARY_TOWER}
    }
    counted, refused = sort_runs(folders, recipes)
    return {
        "results": [
            asdict(claim) | {"ours": summary(counted[claim.recipe], claim.metric, claim.scale)} for claim in RESULTS
        ],
        "figures": [asdict(claim) | {"ours": _figure(claim, counted)} for claim in FIGURES],
        "counts": [asdict(claim) | {"ours": _parameters(networks[claim.recipe])} for claim in COUNTS],
        "auxiliary_towers": [
            {"recipe": path, "source": "section 4.3", "paper": 0, "ours": _auxiliary_towers(networks[path])}
            for path in WITHOUT_AUXILIARY_TOWER
        ],
        "settings": [
            asdict(claim)
            | {"ours": {path: recipes[path][claim.key] for path in claim.recipes}, "equal": _equal(claim, recipes)}
            for claim in SETTINGS
        ],
        "deviations": {path: _deviations(path, values) for path, values in settings.items()},
        "runs": {path: [{"folder": run.folder, "seed": run.seed} for run in runs] for path, runs in counted.items()},
        "refused": [asdict(run) | {"results": without_nan(run.results)} for run in refused],
    }


def _recipes() -> list[str]:
    """The shipped recipes that claims name, in their order."""
    named = [claim.recipe for claim in RESULTS] + [path for claim in SETTINGS for path in claim.recipes]
    return list(dict.fromkeys(named))


def _with_bases(paths: list[str]) -> list[str]:
    """The recipes, each after the one that it builds on."""
    ordered: dict[str, None] = {}
    for path in paths:
        base = base_of(path)
        ordered |= dict.fromkeys([*(_with_bases([base]) if base else []), path])
    return list(ordered)


def _deviations(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    flags = [asdict(flag) | {"value": settings[flag.key]} for flag in read_flags(path)]
    return {"base": base_of(path), "flags": flags}


def _equal(claim: Setting, recipes: dict[str, dict[str, Any]]) -> bool:
    values = [recipes[path][claim.key] for path in claim.recipes]
    return all(bool(value) if claim.paper is True else value == claim.paper for value in values)


def _figure(claim: Figure, counted: dict[str, list[Run]]) -> dict[str, Any] | None:
    """The counted runs of a figure's recipes, or what its ablation measured; None where neither was run."""
    if claim.recipes[0].startswith("recipes/ablations/"):
        return _ablation(Path(claim.recipes[0]).stem)
    runs = {path: [run.folder for run in counted[path]] for path in claim.recipes}
    return {"runs": runs} if any(runs.values()) else None


def _ablation(name: str) -> dict[str, Any] | None:
    """The differences of an ablation's variants to its first, from its stored report."""
    stored = ABLATIONS / f"{name}.json"
    if not stored.is_file():
        return None
    report = json.loads(stored.read_text(encoding="utf-8"))
    differences = {row["variant"]: row["difference"] for row in report["variants"] if row["difference"] is not None}
    if not differences:
        return None
    return {
        "report": f"docs/ablations/{name}.md",
        "metric": report["metric"],
        "compared_with": report["compared_with"],
        "differences": differences,
    }


def _network(recipe: Recipe) -> nn.Module:
    with torch.device("meta"):  # shapes alone: counting needs no weights
        return create_network(recipe.model)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _auxiliary_towers(network: nn.Module) -> int:
    return sum("aux" in name.lower() for name, _ in network.named_modules())
