"""What was measured with weights, kept with them: numbers of a run, or of `python -m xception_pl.evaluate`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xception_pl.weights.stored import TEXTS, Results, Stored, WeightsError

_MOST, _LONGEST = 40, 400  # entries, characters: a file may claim anything


def of_run(metrics: Mapping[str, float], source: str, split: str) -> Results:
    """The held-out metrics of a run (`val_top1` …) and on what they were measured, without the folders of this machine."""
    path = Path(source).expanduser()
    where = f"split {split!r} of {path.name if path.exists() else source}"
    numbers = {name.removeprefix("val_"): float(value) for name, value in metrics.items() if name.startswith("val_")}
    return {**numbers, "data": where}


def read_results(stored: Stored, results: Any) -> None:
    """Checks the results that a file holds and puts them into `stored`.

    Raises:
        WeightsError: they are none.
    """
    fit = isinstance(results, Mapping) and len(results) <= _MOST
    if not fit or not all(_is_result(name, value) for name, value in results.items()):
        raise WeightsError(f"{stored.source} is damaged: its results are no numbers and texts.")
    stored.results = dict(results)


def _is_result(name: Any, value: Any) -> bool:
    if name in TEXTS:
        return isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()
    return isinstance(name, str) and type(value) in (int, float)


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of all weights and statistics: equal for equal numbers, whatever their file and layout in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):  # many files leave them out
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def results_of_evaluation(path: Path, network: nn.Module) -> Results:
    """The numbers of a network in the `evaluation.json` that `evaluate --output` wrote.

    Raises:
        WeightsError: it is no such file, or these weights are not among those that were evaluated.
    """
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        measured = {entry["fingerprint"]: entry for entry in evaluation["networks"]}
        found = measured.get(fingerprint(network))
        if found is None:
            names = ", ".join(str(entry["weights"]) for entry in measured.values())
            raise WeightsError(f"--results {path} was measured with other weights: {names}.")
        low, high = found["top1_interval"]
        numbers = {name: float(found[name]) for name in ("images", "top1", "top5", "loss", "ece")}
        data = f"{evaluation['data']}{', some excluded by a list' if evaluation['excluded'] else ''}"
        texts = {"data": data, "prepared": str(found["preprocessing"])}
        return {**numbers, "top1_low": float(low), "top1_high": float(high), **texts}
    except OSError as error:
        raise WeightsError(f"--results {path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"--results {path} is no evaluation.json of this version: write one with evaluate --output."
        ) from error
