"""The data module under Lightning: batches, exact epochs, exact evaluation, resuming inside an epoch."""

import itertools
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch

from tests.data.tracing import SaveAt, Tracer, table, trainer
from xception_pl.data.config import DataConfig
from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.data.errors import DataError

CONFIG = {"image_size": 8, "train_crop": "resize", "eval_crop": "resize", "flip": False}


def module(rows: int = 103, val_rows: int = 21, accumulate: int = 1, **config: Any) -> ImageNetDataModule:
    return ImageNetDataModule(
        DataConfig(**{**CONFIG, "global_batch": 10, "eval_batch": 4, "workers": 0, **config}),
        seed=3,
        accumulate=accumulate,
        train=table(rows),
        val=table(val_rows),
    )


def run(folder: Path, data: ImageNetDataModule, **options: Any) -> Tracer:
    tracer = Tracer()
    ckpt = options.pop("ckpt_path", None)
    trainer(folder, accumulate_grad_batches=data.accumulate, **options).fit(tracer, data, ckpt_path=ckpt)
    return tracer


def test_batches_are_what_the_contract_says() -> None:
    data = module()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (10, 3, 8, 8)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["label"].dtype == batch["id"].dtype == batch["seed"].dtype == torch.int64
    assert batch["label"].tolist() == [i % 10 for i in batch["id"].tolist()]
    assert batch["image"][:, 0, 0, 0].tolist() == batch["id"].tolist()
    valid = next(iter(data.val_dataloader()))
    assert valid["valid"].all()
    assert valid["id"].tolist() == [0, 1, 2, 3]


def test_numbers_are_known_without_a_trainer() -> None:
    data = module()
    assert (data.train_images, data.val_images) == (103, 21)
    assert (data.steps_per_epoch, data.images_dropped_per_epoch) == (10, 3)
    assert data.class_names == tuple(f"class {i}" for i in range(10))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            [f"class {i}" for i in (0, 1, 3, 2, 4, 5, 6, 7, 8, 9)],
            "Class 2 is 'class 2' in .*train.* and 'class 3' in .*",
        ),
        ([f"class {i}" for i in range(11)], "Class 10 is missing in .*train.* and 'class 10' in .*"),
    ],
    ids=["another order", "one more"],
)
def test_splits_whose_classes_differ_are_refused(names: list[str], says: str) -> None:
    val = table(21).cast_column("label", datasets.ClassLabel(names=names))
    data = ImageNetDataModule(DataConfig(**CONFIG), train=table(40), val=val)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"^{says}: give both splits the same classes in the same order\.$"):
            data.prepare()


def test_a_split_without_class_names_goes_with_any() -> None:
    val = table(21).cast_column("label", datasets.Value("int64"))
    data = ImageNetDataModule(DataConfig(**CONFIG), train=table(40), val=val)
    data.prepare()
    assert len(data.class_names) == 10


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_images_of_other_channels_are_refused_at_once(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"^model.in_chans is {channels}, .*: set it to 1 or 3\.$"):
        ImageNetDataModule(in_chans=channels)


@pytest.mark.parametrize("options", [{"color": "full"}, {"color": "fast"}, {"randaugment": 2}], ids=str)
def test_colour_changes_of_grey_images_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^model.in_chans is 1, but data.color .* data.randaugment .*\.$"):
        ImageNetDataModule(DataConfig(**options), in_chans=1)
    ImageNetDataModule(DataConfig(**options), in_chans=3)


def test_the_shipped_images_come_through_the_streaming_path() -> None:
    data = ImageNetDataModule(
        DataConfig(**CONFIG, source="sample", val_split="test", global_batch=100, workers=0), in_chans=1
    )
    data.prepare()
    assert (data.train_images, data.val_images, data.class_names[9]) == (4000, 1000, "Ankle boot")
    assert next(iter(data.train_dataloader()))["image"].shape == (100, 1, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_shows_each_image_once_and_evaluation_counts_each_once(tmp_path: Path, workers: int) -> None:
    tracer = run(tmp_path, module(workers=workers), max_epochs=2)
    first, second = (list(itertools.chain(*part)) for part in (tracer.seen[:10], tracer.seen[10:]))
    assert len(first) == len(set(first)) == len(second) == len(set(second)) == 100
    assert first != second
    assert tracer.evaluated == list(range(21)) * 2


@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_that_are_kept_stay_as_they_were(prefetch: int) -> None:
    """Workers use their memory again: what they handed over must not change with it."""
    config = {"image_size": 71, "flip": True}
    plain = list(module(**config).train_dataloader()) + list(module(**config).val_dataloader())
    data = module(workers=2, prefetch=prefetch, **config)
    kept = list(data.train_dataloader()) + list(data.val_dataloader())
    assert len(kept) == len(plain) == 16
    for found, wanted in zip(kept, plain, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert found["image"].is_contiguous(memory_format=torch.channels_last)


def test_workers_and_accumulation_do_not_change_the_order(tmp_path: Path) -> None:
    plain = run(tmp_path, module(), max_epochs=2).seen
    assert run(tmp_path, module(workers=3), max_epochs=2).seen == plain
    halves = run(tmp_path, module(accumulate=2), max_epochs=2).seen
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == plain


def test_a_limited_epoch_is_followed_by_the_next_epochs_start(tmp_path: Path) -> None:
    plain = run(tmp_path, module(), max_epochs=2).seen
    limited = run(tmp_path, module(workers=2), max_epochs=2, limit_train_batches=4).seen
    assert limited == plain[:4] + plain[10:14]


@pytest.mark.parametrize(
    ("workers", "accumulate", "stops"),
    [(0, 1, (3, 7)), (0, 2, (4, 14)), (0, 1, (10, 20)), (0, 1, (10, 13)), (0, 1, (1, 29)), (2, 2, (3, 13))],
)
def test_resuming_twice_equals_not_stopping(
    tmp_path: Path, workers: int, accumulate: int, stops: tuple[int, int]
) -> None:
    whole = run(tmp_path, module(accumulate=accumulate), max_epochs=3)
    trace: list[list[int]] = []
    ckpt = None
    for stop in (*stops, None):
        path = tmp_path / f"{stop}.ckpt"
        callbacks = [SaveAt(stop, path)] if stop else []
        part = run(
            tmp_path,
            module(accumulate=accumulate, workers=workers),
            max_epochs=3,
            callbacks=callbacks,
            ckpt_path=ckpt,
            val_check_interval=0.5,
        )
        trace += part.seen
        ckpt = path
    assert trace == whole.seen


@pytest.mark.parametrize(
    ("interval", "after"),
    [({"val_check_interval": 0.5}, [5, 10, 15, 20]), ({"val_check_interval": 4}, [4, 8, 14, 18]),
     ({"val_check_interval": 7, "check_val_every_n_epoch": None}, [7, 14])],
    ids=str,
)  # fmt: skip
def test_evaluation_comes_at_its_interval_and_changes_no_batch(
    tmp_path: Path, interval: dict[str, Any], after: list[int]
) -> None:
    """Lightning sees a finite loader: a share of an epoch, steps of it, and steps across epochs are all understood."""
    plain = run(tmp_path, module(), max_epochs=2).seen
    at: list[int] = []

    class Evaluated(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            at.append(trainer.global_step)

    tracer = run(tmp_path, module(workers=2), max_epochs=2, callbacks=[Evaluated()], **interval)
    assert at == after
    assert tracer.seen == plain
    assert tracer.evaluated == list(range(21)) * len(after)


class SaveEpochs(pl.Callback):
    """Saves where `fit` does: when an epoch and its evaluation are done."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"epoch {trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("max_epochs", [-1, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_of_so_many_steps_goes_on_from_the_end_of_an_epoch(tmp_path: Path, epoch: int, max_epochs: int) -> None:
    limits = {"max_steps": 25, "max_epochs": max_epochs}
    whole = run(tmp_path, module(), callbacks=[SaveEpochs()], **limits)
    assert len(whole.seen) == 25
    path = tmp_path / f"epoch {epoch}.ckpt"
    rest = run(tmp_path, module(), callbacks=[SaveAt(23, tmp_path / "23.ckpt")], ckpt_path=path, **limits)
    last = run(tmp_path, module(), ckpt_path=tmp_path / "23.ckpt", **limits)
    assert rest.seen + last.seen == whole.seen[10 * (epoch + 1) :]


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": 2, "max_steps": 15}])
def test_another_order_may_follow_the_end_of_an_epoch(tmp_path: Path, limits: dict[str, int]) -> None:
    run(tmp_path, module(), callbacks=[SaveEpochs()], **limits)
    rest = run(tmp_path, module(global_batch=20), ckpt_path=tmp_path / "epoch 0.ckpt", **limits)
    assert {len(ids) for ids in rest.seen} == {20}
    assert len(rest.seen) == 5


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_resume_with_another_accumulation_goes_on_inside_the_epoch(tmp_path: Path, before: int, after: int) -> None:
    """What moving to another number of devices does to the micro-batches."""
    whole = [sorted(ids) for ids in run(tmp_path, module(), max_epochs=2).seen]
    first = module(accumulate=before)
    parts = run(tmp_path, first, max_epochs=2, callbacks=[SaveAt(4, tmp_path / "4.ckpt")]).seen
    rest = run(tmp_path, module(accumulate=after), max_epochs=2, ckpt_path=tmp_path / "4.ckpt").seen

    def steps(seen: list[list[int]], accumulate: int) -> list[list[int]]:
        return [sorted(itertools.chain(*seen[i : i + accumulate])) for i in range(0, len(seen), accumulate)]

    assert steps(parts, before) + steps(rest, after) == whole


def test_a_resume_with_another_order_is_refused(tmp_path: Path) -> None:
    run(tmp_path, module(), max_epochs=2, callbacks=[SaveAt(4, tmp_path / "4.ckpt")])
    with pytest.raises(DataError, match="global_batch 10, now 20"):
        run(tmp_path, module(global_batch=20), max_epochs=2, ckpt_path=tmp_path / "4.ckpt")
