"""`ImageNetDataModule`: any image classification source of `datasets`, planned exactly, streamed, cropped, batched."""

import functools
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from xception_pl.data.agree import tell_others, told_by_others
from xception_pl.data.ahead import FillAhead, NodeNeeds
from xception_pl.data.augment import DeviceAugment
from xception_pl.data.batches import EvalBatches, Format, TrainBatches
from xception_pl.data.cache import GroupCache, cache_folder
from xception_pl.data.checks import check_channels, check_device, check_names, check_split
from xception_pl.data.class_weights import label_counts, read_class_weights
from xception_pl.data.config import FREQUENCY, DataConfig
from xception_pl.data.corrupt import CorruptImages
from xception_pl.data.errors import DataError
from xception_pl.data.item import Batch, Item, Position
from xception_pl.data.loader import PlannedLoader
from xception_pl.data.plan import per_device_batch
from xception_pl.data.progress import recount, resumes_between_epochs, train_position
from xception_pl.data.source import ParquetSplit, Split, open_split, table_split
from xception_pl.data.stream import open_cache

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)


class ImageNetDataModule(pl.LightningDataModule):
    """Batches of ImageNet, or of any image classification set that `datasets` reads.

    Training: each image once an epoch in an order that is a function of the data, the seed, the epoch and the global
    batch alone, whatever the number of devices, accumulated batches and workers. Evaluation: each image counted once on
    any number of devices. Resuming takes the position from the trainer and goes on with the next batch, without replay.

    Batches are dicts. Training: "image" uint8 (B, C, S, S), float32 in [-1, 1] once on the device; "label" int64 (B,),
    or float32 multi-hot (B, num_classes); "id" int64 (B,) row ids; "seed" int64 (B,), a random seed an image and epoch.
    Evaluation adds "valid" bool (B,): False on repeated rows that fill a rank's last batches and must not be counted.

    Args:
        config: source, crops, batch sizes.
        seed: of the order and of random crops.
        in_chans: 1 for grey, 3 for colour images; others are converted.
        num_classes: of the network; None takes the source's class names.
        multi_label: labels are lists.
        accumulate: micro-batches an optimiser step, the trainer's `accumulate_grad_batches`.
        train: a dataset in memory that replaces the source's training split.
        val: the same for the held-out split.

    Raises:
        DataError: (in `prepare`, `setup` or a loader) the source cannot be used; one sentence.
        ValueError: global batch, devices and accumulation do not divide; or, at once, images of so many channels cannot
            be read, or not be augmented as `config` says.
    """

    def __init__(
        self,
        config: DataConfig | None = None,
        *,
        seed: int = 0,
        in_chans: int = 3,
        num_classes: int | None = None,
        multi_label: bool = False,
        accumulate: int = 1,
        train: "datasets.Dataset | None" = None,
        val: "datasets.Dataset | None" = None,
    ) -> None:
        super().__init__()
        self.config = config or DataConfig()
        check_channels(in_chans, self.config)
        self.seed, self.in_chans, self.num_classes = seed, in_chans, num_classes
        self.multi_label, self.accumulate = multi_label, accumulate
        self._given = {"train": train, "val": val}
        self._splits: dict[str, Split] = {}
        self._augment: DeviceAugment | None = None
        self._ahead: FillAhead | None = None
        self.faults: Counter[str] = Counter()
        """Reads of this rank that failed and were tried again, by kind."""
        self.decoded_on_cpu = 0
        """With data.decode gpu: training images of this rank that the GPU's decoder does not take."""

    # What the source holds

    def prepare(self, *, train: bool = True, val: bool = True) -> None:
        """Resolve the source: files, rows and classes. Needs no trainer; doing it again costs nothing.

        Raises:
            DataError: one sentence on what is wrong with the source.
        """
        if train and self.config.decode == "gpu":
            check_device(self._device if self.trainer is not None or torch.cuda.is_available() else None, self.in_chans)
        for name, wanted in (("train", train), ("val", val)):
            if wanted and name not in self._splits:
                self._splits[name] = self._open(name)
        if len(self._splits) == 2:
            check_names(self._splits["train"], self._splits["val"])

    def setup(self, stage: str | None = None) -> None:
        """Rank 0 resolves the source and hands it to the others: all go on, or all stop with the same sentence."""
        wanted = {"train": stage in (None, "fit"), "val": True}
        error: DataError | None = None
        if self._rank == 0:
            try:
                self.prepare(**wanted)
            except DataError as caught:
                error = caught
        if self._world > 1 and self.trainer is not None:
            self._splits, error = self.trainer.strategy.broadcast((self._splits, error))
        if error is not None:
            raise error

    def share(self, first: Callable[[Callable[[], dict[str, Split]]], dict[str, Split]]) -> None:
        """Take what rank 0 has resolved, before there is a trainer; `first` gives each rank what rank 0's function returns."""
        self._splits = first(lambda: self._splits)

    @property
    def train_images(self) -> int:
        """Images of the training split."""
        if "train" not in self._splits and self.config.train_images is not None:
            return self.config.train_images
        return self._split("train").images

    @property
    def val_images(self) -> int:
        """Images of the held-out split."""
        if "val" not in self._splits and self.config.val_images is not None:
            return self.config.val_images
        return self._split("val").images

    @property
    def commit(self) -> str | None:
        """Commit of the hub dataset, fixed when it was resolved; None for other sources."""
        split = self._split("train")
        return split.commit if isinstance(split, ParquetSplit) else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where the source has no names."""
        split = self._splits.get("train") or self._split("val")
        if split.labels.names is not None:
            return split.labels.names
        if self.num_classes is None:
            raise DataError(f"Labels of {split.where} have no class names: give the number of classes.")
        return tuple(str(i) for i in range(self.num_classes))

    def class_weights(self) -> list[float] | None:
        """Weights of the classes in MAP@100, as `data.class_weights` says; `frequency` reads all training labels.

        Raises:
            DataError: the file does not fit, or a label lies outside the classes.
        """
        source, classes = self.config.class_weights, self._format().classes
        if source is None:
            return None
        if source != FREQUENCY:
            return read_class_weights(source, classes)
        return label_counts(self._split("train"), classes, self.config.retry_seconds)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch."""
        return self.train_images // self.config.global_batch

    @property
    def images_dropped_per_epoch(self) -> int:
        """Images that the last, incomplete global batch would hold; other ones in every epoch."""
        return self.train_images % self.config.global_batch

    @property
    def per_device_batch(self) -> int:
        """Images a device and micro-batch."""
        return per_device_batch(self.config.global_batch, self._world, self.accumulate)

    # What Lightning asks for

    def train_dataloader(self) -> PlannedLoader:
        trainer = self.trainer
        if trainer is not None and trainer.accumulate_grad_batches != self.accumulate:
            raise ValueError(
                f"The data module accumulates {self.accumulate} batches a step and the trainer "
                f"{trainer.accumulate_grad_batches}: give both the same number."
            )
        split, config = self._split("train"), self.config
        cache = self._cache("train")
        batches = TrainBatches(
            split,
            config,
            self._format(),
            cache,
            seed=self.seed,
            rank=self._rank,
            world=self._world,
            accumulate=self.accumulate,
        )
        order: dict[str, int | str] = {
            "seed": self.seed,
            "images": split.images,
            "global_batch": config.global_batch,
            "shuffle_window": config.shuffle_window,
        }
        if self.commit is not None:
            order["revision"] = self.commit
        return PlannedLoader(
            batches,
            position=lambda: train_position(self.trainer),
            workers=config.workers,
            prefetch=config.prefetch,
            order=order,
            accumulate=self.accumulate,
            on_resume=lambda before: recount(self.trainer, before, self.accumulate),
            new_epoch=lambda: resumes_between_epochs(self.trainer),
            endless=True,
            on_faults=self.faults.update,
            on_batch=self._fill_ahead(split, cache) if cache is not None and self._local_rank == 0 else None,
            on_corrupt=CorruptImages(
                split, self._corrupt_file, config.max_corrupt * split.images / self._world, "data.max_corrupt"
            ),
            finish=functools.partial(self._decode_on_device, batches) if config.decode == "gpu" else None,
        )

    def val_dataloader(self) -> PlannedLoader:
        split = self._split("val")
        batches = EvalBatches(
            split,
            self.config,
            self._format(),
            self._cache("val"),
            seed=self.seed,
            rank=self._rank,
            world=self._world,
        )
        return PlannedLoader(
            batches,
            position=lambda: (0, 0),
            workers=self.config.workers,
            prefetch=self.config.prefetch,
            on_faults=self.faults.update,
            on_corrupt=CorruptImages(split, self._corrupt_file, split.images, "data.val_corrupt"),
        )

    def test_dataloader(self) -> PlannedLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> PlannedLoader:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The part of the work that is done on the device: colour, mixing, scaling to [-1, 1]."""
        if self._augment is None:
            self._augment = DeviceAugment(self.config, self._format().classes)
        training = self.trainer is not None and bool(self.trainer.training)
        changed: Batch = self._augment(batch, training)
        return changed

    # Inside

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _corrupt_file(self) -> Path | None:
        return Path(self.trainer.default_root_dir) / "corrupt.csv" if self.trainer is not None else None

    @property
    def _local_rank(self) -> int:
        return self.trainer.local_rank if self.trainer is not None else 0

    def _cache(self, name: str) -> GroupCache | None:
        config = self.config
        return open_cache(self._split(name), config.cache_dir, config.cache_gb, config.retry_seconds)

    @property
    def _device(self) -> torch.device:
        """Where training images are decoded."""
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cuda")

    def _decode_on_device(self, batches: TrainBatches, item: Item) -> Item | DataError:
        done = batches.on_device(item, self._device)
        if isinstance(done, Item):
            self.decoded_on_cpu += len(done.cpu_images)
        return done

    def _fill_ahead(self, split: Split, cache: GroupCache) -> Callable[[Position], None]:
        """Have a process fetch what this node's ranks need next; returns what tells it where the training is."""
        ranks = self.trainer.num_devices if self.trainer is not None else 1
        needs = NodeNeeds(
            split.rows,
            seed=self.seed,
            global_batch=self.config.global_batch,
            window=self.config.shuffle_window,
            rank=self._rank,
            ranks=ranks,
            world=self._world,
        )
        assert isinstance(split, ParquetSplit)
        step_bytes = split.bytes / split.images * self.config.global_batch * ranks / self._world
        # a third of the room for what comes, the rest for what is in use and what is used again
        steps = max(1, int(cache.limit_bytes / 3 / step_bytes))

        def told(position: Position) -> None:
            if self._ahead is None:
                self._ahead = FillAhead(cache, needs, self.steps_per_epoch, steps)
            self._ahead.training_at(position[0], position[1] // self.accumulate)

        return told

    def on_exception(self, exception: BaseException) -> None:
        """Let all ranks end with the sentence of the one whose data failed, not with their broken connections to it."""
        if isinstance(exception, DataError):
            tell_others(exception)
        elif isinstance(exception, RuntimeError) and (told := told_by_others()) is not None:
            raise told from exception

    def teardown(self, stage: str | None = None) -> None:
        """End the process that fills the cache; tell the reads that had to be tried again."""
        if self._ahead is not None:
            self.faults.update(self._ahead.faults())
            self._ahead.close()
            self._ahead = None
        if self.decoded_on_cpu:
            _log.warning("%d training images were decoded on the CPU: no plain JPEGs.", self.decoded_on_cpu)
        if self.faults:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in self.faults.most_common())
            _log.warning("%d reads failed and were tried again (%s).", self.faults.total(), kinds)

    def _split(self, name: str) -> Split:
        self.prepare(train=name == "train", val=name == "val")
        return self._splits[name]

    def _open(self, name: str) -> Split:
        config = self.config
        title = config.train_split if name == "train" else config.val_split
        given = self._given[name]
        if given is not None:
            split: Split = table_split(given, f"the {title} dataset given", config.image_column, config.label_column)
        else:
            split = open_split(
                config.source,
                title,
                revision=config.revision,
                image_column=config.image_column,
                label_column=config.label_column,
                keep=cache_folder(config.cache_dir) / "footers",
            )
        expected = config.train_images if name == "train" else config.val_images
        check_split(split, f"data.{name}_images", expected, self.num_classes, self.multi_label)
        return split

    def _format(self) -> Format:
        classes = self.num_classes if self.num_classes is not None else len(self.class_names)
        return Format(channels=self.in_chans, classes=classes, multi_label=self.multi_label)
