"""Numbers of finished runs, read back and written on: `results.json` may hold what is no JSON. Imports no torch."""

import json
import math
from pathlib import Path
from typing import Any


def read_results(folder: Path) -> dict[str, float]:
    """A finished run's `results.json`; not a number, written as NaN or null, comes back as NaN.

    Raises:
        FileNotFoundError: the run is not finished.
        json.JSONDecodeError: the file was cut off.
    """
    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {name: math.nan if value is None else value for name, value in stored.items()}


def without_nan(value: Any) -> Any:
    """Nested numbers with None for each that is not finite (a run that diverged), for which JSON has no word."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
