"""The stored references can be made again: needs an interpreter that has tensorflow-cpu and keras."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent


def assert_same(again: Any, stored: Any, where: str) -> None:
    if isinstance(stored, dict):
        assert again.keys() == stored.keys(), where
        for key in stored:
            assert_same(again[key], stored[key], f"{where}.{key}")
    elif isinstance(stored, list):
        assert len(again) == len(stored), where
        for i, (left, right) in enumerate(zip(again, stored, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    else:
        assert again == pytest.approx(stored, rel=1e-8, abs=1e-10), where


@pytest.mark.slow
@pytest.mark.skipif(
    "XCEPTION_TENSORFLOW_PYTHON" not in os.environ,
    reason="name an interpreter with tensorflow-cpu and keras in XCEPTION_TENSORFLOW_PYTHON",
)
def test_tensorflow_gives_the_stored_numbers_again(tmp_path: Path) -> None:
    command = [os.environ["XCEPTION_TENSORFLOW_PYTHON"], "-m", "scripts.references.make_tensorflow_references"]
    subprocess.run([*command, str(tmp_path)], cwd=FOLDER.parents[1], check=True)
    for name in ("tensorflow_ops.json", "xception_trajectory.json"):
        again, stored = (json.loads((folder / name).read_text()) for folder in (tmp_path, FOLDER))
        del again["made_with"], stored["made_with"]
        assert_same(again, stored, name)
