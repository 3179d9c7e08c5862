"""Impossible data configurations, told without torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xception_pl.data.config import DataConfig, check


def test_the_defaults_and_the_sample_are_possible() -> None:
    assert check(DataConfig()) == []
    assert check(DataConfig(source="sample", val_split="test")) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 70}, "data.image_size 70 is below 71 px"),
        ({"global_batch": 0}, "data.global_batch 0 is below 1"),
        ({"eval_batch": 0}, "data.eval_batch 0"),
        ({"workers": -1}, "data.workers -1 is below 0"),
        ({"prefetch": 0}, "data.prefetch 0"),
        ({"shuffle_window": 0}, "data.shuffle_window 0"),
        ({"mixup": -0.1}, "data.mixup -0.1 is negative"),
        ({"random_erasing": 1.5}, "data.random_erasing 1.5 is not within 0 to 1"),
        ({"crop_area_min": -0.5}, "data.crop_area_min"),
        ({"randaugment_magnitude": 11.0}, "data.randaugment_magnitude"),
        ({"source": "./nowhere"}, "data.source ./nowhere does not exist"),
        ({"source": "sample", "revision": "main"}, "data.revision main"),
        ({"train_images": 10, "global_batch": 11}, "data.global_batch 11 is more than data.train_images 10"),
        ({"label_column": "image"}, "both 'image'"),
        ({"val_split": ""}, "data.val_split is empty"),
    ],
)
def test_each_impossible_value_is_one_sentence(change: dict[str, Any], says: str) -> None:
    wrong = check(DataConfig(**change))
    assert len(wrong) == 1
    assert says in wrong[0]
    assert wrong[0].endswith(".")
    assert "\n" not in wrong[0]


def test_all_are_told_at_once(tmp_path: Path) -> None:
    assert len(check(DataConfig(source=str(tmp_path / "no"), image_size=1, global_batch=0))) == 3


def test_checking_imports_neither_torch_nor_datasets() -> None:
    code = (
        "import sys; from xception_pl.data.config import DataConfig, check; check(DataConfig());"
        "sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'pyarrow', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
