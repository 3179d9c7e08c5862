"""Which keys of a recipe decide a run's numbers: two runs that agree in them are runs of one recipe. Imports no torch."""

from collections.abc import Mapping
from typing import Any

IDLE = (
    "run.",
    "trainer.enable_progress_bar",
    "trainer.timeout_seconds",
    "data.workers",
    "data.prefetch",
    "data.cache_dir",
    "data.cache_gb",
    "data.retry_seconds",
)
"""Beginnings of the keys that decide none: where a run is written, what is shown, how images are fetched ahead and kept."""


def what_decides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a resolved recipe's dotted keys those that decide its numbers, the seed among them."""
    return {key: value for key, value in settings.items() if not key.startswith(IDLE)}
