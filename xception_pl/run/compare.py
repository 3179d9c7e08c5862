"""Whether two runs were the same: images, losses, metrics, and all that a checkpoint holds."""

from pathlib import Path
from typing import Any

import torch

from xception_pl.run.folder import read_starts
from xception_pl.run.metrics_csv import read_metrics
from xception_pl.run.trace import read_trace

_CLOCK = ("images_per_second", "data_wait")


def compare(whole: Path, parts: Path, tolerance: float) -> tuple[list[str], bool]:
    """A table of what was compared, with a verdict; and whether the runs were the same.

    Args:
        whole: Folder of the undisturbed run, with a trace.
        parts: Folder of the run that was killed and resumed.
        tolerance: Largest relative difference of losses, metrics and weights that counts as none.
    """
    resumed_from = [start["step"] for start in read_starts(parts)[1:]]
    traces = [
        (read_trace(folder, rank) for folder in (whole, parts)) for rank in range(len(list(whole.glob("trace-*"))))
    ]
    pairs = [(step, one[step], other.get(step)) for one, other in traces for step in one]
    images = [step for step, one, other in pairs if other is None or one[0] != other[0]]
    losses = [
        1.0 if other is None else _relative(float.fromhex(one[1]), float.fromhex(other[1])) for _, one, other in pairs
    ]
    first, second = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, parts))
    rows = [_rows(whole), _rows(parts)]
    differences: dict[str, tuple[str, float]] = {
        "images": (f"{len(pairs)} batches, {len(traces)} ranks", 1.0 if images else 0.0),
        "losses": (f"{len(losses)} batches", max(losses)),
        "metrics": (f"{len(rows[0])} rows", _difference(rows[0], rows[1])),
        "weights, averages, statistics": (
            _size(first["state_dict"]),
            _difference(first["state_dict"], second["state_dict"]),
        ),
        "optimiser": (
            _size(first["optimizer_states"]),
            _difference(first["optimizer_states"], second["optimizer_states"]),
        ),
        "position": (f"step {first['global_step']}", 0.0 if first["loops"] == second["loops"] else 1.0),
    }
    lines = ["", f"{'':<32}{'compared':<28}largest relative difference"]
    lines += [f"{name:<32}{what:<28}{_said(value)}" for name, (what, value) in differences.items()]
    worst = max(value for name, (_, value) in differences.items() if name not in ("images", "position"))
    exact = not images and differences["position"][1] == 0 and worst <= tolerance and any(resumed_from)
    lines.append("")
    if not any(resumed_from):
        lines.append("NOT SHOWN: the second run never went on from a checkpoint.")
    elif exact:
        how = "to the bit" if worst == 0 else f"within {tolerance:g}"
        lines.append(f"EXACT: killed, and resumed from step {resumed_from[-1]}, the run is the undisturbed one, {how}.")
    else:
        where = f" Images differ first at step {images[0][0]}." if images else ""
        lines.append(f"NOT EXACT: resumed from step {resumed_from[-1]}, the run is another one.{where}")
    return lines, exact


def _rows(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name not in _CLOCK}
        for row in read_metrics(folder / "metrics.csv")
    ]


def _said(value: float) -> str:
    return "none: identical to the bit" if value == 0 else f"{value:.3g}"


def _relative(one: float, other: float) -> float:
    if one == other or (one != one and other != other):
        return 0.0
    return abs(one - other) / max(abs(one), abs(other))


def _difference(one: Any, other: Any) -> float:
    """Largest difference of two nested states, relative to the largest value of the tensor it is in; 1 for other shapes."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape:
            return 1.0
        if torch.equal(one, other) or not one.numel():
            return 0.0
        scale = max(float(one.abs().max()), float(other.abs().max()))
        return float((one.double() - other.double()).abs().max()) / scale
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((_difference(one[name], other[name]) for name in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return _relative(one, other)
    return 0.0 if one == other else 1.0


def _size(state: Any) -> str:
    return f"{_numbers(state):,} numbers"


def _numbers(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel()
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(_numbers(value) for value in inner)
