"""The small multi-label set: real garments, true labels, the same everywhere."""

import hashlib
import io

import datasets
import numpy as np
import pytest
from PIL import Image

from xception_pl.data.config import OUTFITS, SAMPLE, DataConfig
from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.data.outfits import PICTURES, outfits
from xception_pl.data.source import open_split

DIGESTS = {
    "train": "a97d8f56e7bc6e511a578a53820e8b541891a2394607caff96f18555575806a9",
    "test": "e725af4b7f0006e10a8331038608b44ec55d5c5c14c042b942772f58cf23dc65",
}


def pictures(split: str) -> list[np.ndarray]:
    return [np.asarray(image) for image in outfits(split)["image"]]


@pytest.mark.parametrize("split", PICTURES)
def test_the_same_pixels_on_every_machine(split: str) -> None:
    assert hashlib.sha256(b"".join(picture.tobytes() for picture in pictures(split))).hexdigest() == DIGESTS[split]


def test_the_labels_are_those_of_the_garments_seen() -> None:
    """Each quarter is black or one of the shipped test images, whose labels together are the picture's."""
    table = open_split(SAMPLE, "test")
    kinds: dict[bytes, set[int]] = {}
    for row in datasets.Dataset.from_parquet(table.files[0]):  # type: ignore[attr-defined]
        kinds.setdefault(np.asarray(row["image"]).tobytes(), set()).add(row["label"])
    made = outfits("test")
    numbers = np.zeros(5, int)
    for image, labels in zip(made["image"], made["label"], strict=True):
        quarters = np.asarray(image).reshape(2, 28, 2, 28).transpose(0, 2, 1, 3).reshape(4, 28, 28)
        garments = [quarter for quarter in quarters if quarter.any()]
        assert labels == sorted(set().union(*(kinds[garment.tobytes()] for garment in garments)))
        numbers[len(garments)] += 1
    assert numbers[0] == 0
    assert all(200 < count < 300 for count in numbers[1:])


def test_a_recipe_reads_it_as_any_source() -> None:
    config = DataConfig(source=OUTFITS, val_split="test", image_size=71, train_crop="resize", global_batch=8, workers=0)
    data = ImageNetDataModule(config, in_chans=1, multi_label=True)
    data.prepare()
    assert (data.train_images, data.val_images, len(data.class_names)) == (4000, 1000, 10)
    batch = next(iter(data.train_dataloader()))
    made = outfits("train")
    assert batch["image"].shape == (8, 1, 71, 71)
    for hot, row in zip(batch["label"], batch["id"].tolist(), strict=True):
        assert hot.nonzero().flatten().tolist() == made[row]["label"]


def test_a_picture_is_a_plain_png() -> None:
    stored = outfits("test").cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    image = Image.open(io.BytesIO(stored))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (56, 56))
