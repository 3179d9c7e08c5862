"""The kernels run in Triton's interpreter, on the CPU, where there is no GPU; with one, they run on it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.interpreted import PATCHES
from xception_pl.kernels import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "elementwise": {"ROWS": 64, "CHANNELS": 16},
    "sums": {"ROWS": 64, "CHANNELS": 16, "per_sm": 1},
    "depthwise": {"COLUMNS": 16, "CHANNELS": 16, "STAGES": 1},
    "depthwise_backward": {"COLUMNS": 16, "CHANNELS": 16, "STAGES": 1, "per_sm": 1},
    "pool": {"COLUMNS": 16, "CHANNELS": 16, "STAGES": 1},
    "pool_backward": {"COLUMNS": 16, "CHANNELS": 16, "STAGES": 1, "per_sm": 1},
    "pointwise": {"M": 64, "N": 16, "K": 16, "per_sm": 1},
    "pointwise_input": {"M": 64, "N": 16, "K": 16, "per_sm": 1},
    "pointwise_weight": {"M": 64, "N": 16, "K": 16, "per_sm": 1},
}
LARGE = {"ROWS": 4096, "COLUMNS": 64, "CHANNELS": 64, "M": 4096, "N": 64, "K": 64}
"""Sizes for which a small network is one tile: the interpreter's time is that of its operations, not of their size."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and an interpreter that does not work twice."""
    if DEVICE == "cpu":
        for owner, name, quicker in PATCHES:
            monkeypatch.setattr(owner, name, quicker)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def set_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets sizes of all kernels' tiles, cut to what they need: small ones have seams, large ones run fast here."""

    def set_(**sizes: int) -> None:
        chosen = {
            kernel: {"any": {name: sizes.get(name, value) for name, value in small.items()}}
            for kernel, small in SMALL.items()
        }
        path = tmp_path / "tiles.json"
        path.write_text(json.dumps({"default": {"tiles": chosen}}))
        monkeypatch.setattr(tiles, "FILE", path)
        tiles.table.cache_clear()
        tiles.tile_for.cache_clear()

    set_()
    yield set_
    monkeypatch.undo()
    tiles.table.cache_clear()
    tiles.tile_for.cache_clear()
