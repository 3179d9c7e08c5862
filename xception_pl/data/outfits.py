"""`sample-outfits`: pictures of one to four of the shipped garments, each with the list of its kinds.

A small real multi-label set, to run the paper's second experiment (section 4.1, JFT) from end to end where nothing can
be downloaded. It is made when it is asked for, in about two seconds, the same on every machine.
"""

import io
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from xception_pl.data.config import SAMPLE, local_path

if TYPE_CHECKING:
    import datasets

PICTURES = {"train": 4000, "test": 1000}
"""Pictures of each split, made of garments of the same split of `sample`."""

_SIDE = 28  # pixels of a garment
_SEEDS = {"train": 0, "test": 1}


def outfits(split: str) -> "datasets.Dataset":
    """Grey pictures of 56 × 56 pixels, `image` (PNG) and `label` (ascending list of one to four classes).

    Each has one to four garments, drawn with replacement, in different quarters; the other quarters are black.
    """
    from datasets import ClassLabel, Dataset, Features, List
    from datasets import Image as ImageFeature

    folder = local_path(SAMPLE)
    assert folder is not None
    table = pq.read_table(folder / f"{split}.parquet")
    names = Features.from_arrow_schema(table.schema)["label"].names
    garments = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table.column("image").to_pylist()]
    kinds = table.column("label").to_numpy()
    # Raw bits and not a Generator's methods, whose draws NumPy may change from release to release.
    drawn = np.random.PCG64(_SEEDS[split]).random_raw(PICTURES[split] * 9).reshape(-1, 9)
    chosen, counts = drawn[:, :4] % len(garments), 1 + drawn[:, 4] % 4
    quarters = drawn[:, 5:].argsort(axis=1)
    pictures, labels = [], []
    for picked, count, where in zip(chosen, counts, quarters, strict=True):
        picture = np.zeros((2, _SIDE, 2, _SIDE), np.uint8)  # row and column of the quarter, each before its pixels
        for garment, quarter in zip(picked[:count], where, strict=False):
            picture[quarter // 2, :, quarter % 2] = garments[garment]
        pictures.append({"bytes": _png(picture.reshape(2 * _SIDE, 2 * _SIDE)), "path": None})
        labels.append(sorted({int(kinds[garment]) for garment in picked[:count]}))
    features = Features({"image": ImageFeature(), "label": List(ClassLabel(names=names))})
    return Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def _png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", compress_level=1)
    return out.getvalue()
