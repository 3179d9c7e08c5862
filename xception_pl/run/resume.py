"""Whether a checkpoint may go on under a recipe, and what has changed since."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xception_pl.recipe import Recipe, RecipeError, flat, schema, to_plain
from xception_pl.run.decides import what_decides

_FIXED = (
    "seed",
    "model.",
    "data.global_batch",
    "data.source",
    "optim.name",
    "optim.l2_on",
    "optim.layer_decay",
    "optim.loss",
)
"""Keys without which a checkpoint's weights, optimiser state or position mean something else."""
_FREE = ("model.compile", "model.channels_last", "model.grad_checkpointing", "model.kernels")
"""Of these, keys that say how the network is computed, not what it is."""


@dataclass(kw_only=True)
class Resumed:
    """A checkpoint that may go on."""

    checkpoint: Path
    step: int
    """Optimiser steps made."""
    changed: dict[str, str] = field(default_factory=dict)
    """Keys of the recipe that are not what they were, with both values; all of them may change."""

    def lines(self) -> list[str]:
        """What changed, a line each, and what that means."""
        decisive = what_decides(self.changed)
        return [
            f"{name} {how}"
            + ("; may change, and from here on this is another recipe's run" if name in decisive else "")
            for name, how in self.changed.items()
        ]


def load_for_resume(path: Path, recipe: Recipe) -> Resumed:
    """Checks that a checkpoint belongs to this recipe.

    Raises:
        RecipeError: where the file is no checkpoint, or the network, seed or batch differ.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored = checkpoint["recipe"]
        changed = _differences(stored, recipe)
        averaged = bool(stored["optim"]["ema_decay"])
        step = int(checkpoint["global_step"])
    except Exception as error:
        raise RecipeError([f"--resume: {path} is not a checkpoint of a run: {str(error).splitlines()[0]}"]) from error
    fatal = [f"{name} {how}" for name, how in changed.items() if name.startswith(_FIXED) and name not in _FREE]
    if averaged != bool(recipe.optim.ema_decay):
        fatal.append(f"optim.ema_decay {changed['optim.ema_decay']}, and averaging cannot be switched on or off")
    if fatal:
        raise RecipeError([f"--resume: {path} was trained with another recipe: {sentence}." for sentence in fatal])
    return Resumed(checkpoint=path, step=step, changed=changed)


def _differences(stored: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """Keys whose values differ, with both; a key that the checkpoint does not know yet had its default."""
    old, new = {key.name: key.default for key in schema()} | flat(stored), flat(to_plain(recipe))
    names = [*new, *(name for name in old if name not in new)]
    return {
        name: f"was {old.get(name)!r} and is {new.get(name)!r}"
        for name in names
        if _plain(old.get(name)) != _plain(new.get(name))
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
