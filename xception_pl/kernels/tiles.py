"""How large a kernel's tiles are and how many programs share the work: tiles.json, by card, kernel and shape.

`default` holds what was chosen by reasoning from reports of the compiler; `python -m xception_pl.bench tune` measures
on the card at hand and adds an entry of its name, which then wins. Keys of shapes are channels, or for matrix
products "input x output channels"; `any` stands for the others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("tiles.json")
MULTIPROCESSORS = 132
"""An H100's. The same on every card: how sums are split, and so their last bits, then depends on the shapes alone."""


@dataclass(frozen=True)
class Tile:
    """Options of a launch (tile sizes in capitals, num_warps, num_stages) and programs to start a multiprocessor."""

    options: dict[str, int]
    per_sm: int


@cache
def table() -> dict[str, Any]:
    """The stored file."""
    stored: dict[str, Any] = json.loads(FILE.read_text())
    return stored


@cache
def card() -> str:
    """The name of the card at hand; `default` where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "default"


def speedup() -> float | None:
    """The fused training step's speed over the plain layers', as measured on this card; None where it was not."""
    measured: float | None = table().get(card(), {}).get("speedup")
    return measured


@cache
def tile_for(kernel: str, shape: str) -> Tile:
    """The tile of a kernel for a shape: the card's if it was tuned, else the default."""
    for name in (card(), "default"):
        entries = table().get(name, {}).get("tiles", {}).get(kernel, {})
        found = entries.get(shape) or entries.get("any")
        if found is not None:
            options = dict(found)
            return Tile(per_sm=options.pop("per_sm", 1), options=options)
    raise AssertionError(f"no tile for {kernel} {shape}")


def aligned(*channels: int) -> int:
    """The largest power of two, up to 16, that divides the channel counts."""
    return gcd(16, *channels)


def programs(tasks: int, others: int, per_sm: int) -> int:
    """Programs among which `tasks` are dealt where `others` more dimensions of the grid have so many: at least one."""
    return max(1, min(tasks, MULTIPROCESSORS * per_sm // others))
