"""Real pictures in files: of each kind that people have, and junk."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image


def photograph(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A smooth coloured picture with some detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def shipped(row: int) -> bytes:
    """A PNG of the shipped images."""
    content: bytes = pq.read_table("xception_pl/data/sample/test.parquet")["image"][row].as_py()["bytes"]
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files in the order of their paths: JPEGs, PNGs, junk."""
    here = tmp_path / "pictures"
    (here / "sub").mkdir(parents=True)
    photograph(0).save(here / "a.jpg", quality=90)
    photograph(1, 90, 200).save(here / "b.JPEG", quality=80, progressive=True)
    (here / "c.png").write_bytes(shipped(0))
    (here / "d.jpg").write_bytes(b"this is no picture")
    cut = io.BytesIO()
    photograph(2).save(cut, "JPEG")
    (here / "e.jpg").write_bytes(cut.getvalue()[: len(cut.getvalue()) // 2])
    (here / "f.png").write_bytes(b"")
    photograph(3).convert("L").save(here / "sub" / "g.png")
    (here / "notes.txt").write_text("not a picture, and not asked for")
    return here
