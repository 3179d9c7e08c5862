"""The ledger, put together from the claims, the recipes, the networks and finished runs."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from xception_pl.nets.create import create_network
from xception_pl.recipe import load_recipe
from xception_pl.reproduce.claims import COUNTS, FIGURES, RESULTS, SETTINGS, WITHOUT_AUXILIARY_TOWER, Setting
from xception_pl.reproduce.flags import base_of, read_flags
from xception_pl.reproduce.runs import shipped_settings, sort_runs, summary

Ledger = dict[str, Any]


def make_ledger(folders: list[str]) -> Ledger:
    """Everything that the command prints, in YAML's own types.

    Raises:
        ValueError: a folder holds no run.
    """
    recipes = {path: shipped_settings(path) for path in _recipes()}
    counted, refused = sort_runs(folders, recipes)
    return {
        "results": [
            asdict(claim) | {"ours": summary(counted[claim.recipe], claim.metric, claim.scale)} for claim in RESULTS
        ],
        "figures": [asdict(claim) for claim in FIGURES],
        "counts": [asdict(claim) | {"ours": _parameters(_network(claim.recipe))} for claim in COUNTS],
        "auxiliary_towers": [
            {"recipe": path, "source": "section 4.3", "paper": 0, "ours": _auxiliary_towers(_network(path))}
            for path in WITHOUT_AUXILIARY_TOWER
        ],
        "settings": [
            asdict(claim)
            | {"ours": {path: recipes[path][claim.key] for path in claim.recipes}, "equal": _equal(claim, recipes)}
            for claim in SETTINGS
        ],
        "deviations": {
            path: {
                "base": base_of(path),
                "flags": [asdict(flag) | {"value": recipes[path][flag.key]} for flag in read_flags(path)],
            }
            for path in recipes
        },
        "runs": {path: [{"folder": run.folder, "seed": run.seed} for run in runs] for path, runs in counted.items()},
        "refused": [asdict(run) for run in refused],
    }


def _recipes() -> list[str]:
    """The shipped recipes that claims name, in their order."""
    named = [claim.recipe for claim in RESULTS] + [path for claim in SETTINGS for path in claim.recipes]
    return list(dict.fromkeys(named))


def _equal(claim: Setting, recipes: dict[str, dict[str, Any]]) -> bool:
    values = [recipes[path][claim.key] for path in claim.recipes]
    return all(bool(value) if claim.paper is True else value == claim.paper for value in values)


def _network(path: str) -> nn.Module:
    with torch.device("meta"):  # shapes alone: counting needs no weights
        return create_network(load_recipe(path).model)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _auxiliary_towers(network: nn.Module) -> int:
    return sum("aux" in name.lower() for name, _ in network.named_modules())
