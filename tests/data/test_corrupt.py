"""Images that cannot be decoded: replaced, named and capped in training; fatal in evaluation unless allowed."""

import csv
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.data.tracing import CLASSES, Tracer, features, png, trainer
from xception_pl.data.config import DataConfig
from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.data.errors import DataError

BAD = {7: b"", 8: png(8, 64)[:-60], 30: b"not an image"}


def damaged(rows: int, bad: dict[int, bytes]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": bad.get(i, png(i)), "path": None} for i in range(rows)],
            "label": [i % CLASSES for i in range(rows)],
        },
        features=features(),
    )


def module(bad_train: dict[int, bytes], bad_val: dict[int, bytes], **config: Any) -> ImageNetDataModule:
    made = {"image_size": 71, "train_crop": "resize", "eval_crop": "resize", "flip": False, "global_batch": 10}
    return ImageNetDataModule(
        DataConfig(**{**made, "eval_batch": 4, "workers": 0, **config}),
        train=damaged(40, bad_train),
        val=damaged(11, bad_val),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_replaced_by_the_next_whole_one_and_named_once(tmp_path: Path, workers: int) -> None:
    data, tracer = module(BAD, {}, max_corrupt=0.1, workers=workers), Tracer()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(tracer, data)
    assert [len(ids) for ids in tracer.seen] == [10] * 8
    assert sorted(i for ids in tracer.seen[:4] for i in ids) == list(range(40))
    with (tmp_path / "corrupt.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert sorted(int(line["row"]) for line in lines) == sorted(BAD)
    assert all(line["source"] and line["reason"] for line in lines)


def test_the_replacement_has_its_own_label_and_is_always_the_same() -> None:
    shown = {}
    for _ in range(2):
        for batch in module(BAD, {}, max_corrupt=1.0).train_dataloader():
            for i, label, pixel in zip(
                batch["id"].tolist(), batch["label"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True
            ):
                assert shown.setdefault(i, (label, pixel)) == (label, pixel)
    assert shown[7] == shown[8] == (9, 9)
    assert shown[30] == (1, 31)
    assert shown[5] == (5, 5)


def test_too_many_corrupt_images_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"3 images of .* cannot be decoded, more than data.max_corrupt .*corrupt.csv.*\.$"
    ):
        trainer(tmp_path, max_epochs=1).fit(Tracer(), module(BAD, {}, max_corrupt=0.05))


def test_a_corrupt_held_out_image_is_fatal_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Row 5 of .* cannot be decoded .*data.val_corrupt: skip\.$"):
        trainer(tmp_path).validate(Tracer(), module({}, {5: b"x"}), verbose=False)
    tracer = Tracer()
    trainer(tmp_path).validate(tracer, module({}, {5: b"x"}, val_corrupt="skip"), verbose=False)
    assert tracer.evaluated == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
