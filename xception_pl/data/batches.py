"""Batches by position: the datasets that loader workers run. One item is one whole batch of one rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from xception_pl.data.cache import GroupCache
from xception_pl.data.config import DataConfig
from xception_pl.data.decode import (
    MAX_PIXELS,
    DecodeError,
    Pixels,
    eval_image,
    plain_jpeg_size,
    train_crop,
    train_image,
)
from xception_pl.data.device_decode import Undecoded, decode_on
from xception_pl.data.errors import DataError
from xception_pl.data.fetch import new_faults
from xception_pl.data.item import Corrupt, Item, Position
from xception_pl.data.native import TAIL
from xception_pl.data.plan import EpochPlan, EvalPlan, image_seeds, per_device_batch
from xception_pl.data.source import Split
from xception_pl.data.stream import Row, RowReader, check_labels, open_reader

_REPLACEMENTS = 100  # rows tried in the place of a corrupt one


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a batch looks like."""

    channels: int
    classes: int
    multi_label: bool

    def labels(self, rows: Sequence[Row]) -> Tensor:
        """int64 (B,), or float32 multi-hot (B, classes)."""
        if not self.multi_label:
            return torch.tensor([row.labels[0] for row in rows], dtype=torch.int64)
        hot = torch.zeros(len(rows), self.classes)
        for i, row in enumerate(rows):
            hot[i, list(row.labels)] = 1
        return hot


class _Batches(Dataset[Item | DataError]):
    """What training and evaluation share: a reader and room for images, opened in the process that uses them.

    `rooms` is how many batches of a worker may be in use at a time. A worker makes its images in memory that the
    trainer's process maps, so nothing is copied when it hands them over, and writes over the oldest when it has made
    `rooms` others: fresh shared memory for each batch costs a page fault every 4 kB, up to a fifth of decoding's time.
    """

    def __init__(self, split: Split, config: DataConfig, form: Format, cache: GroupCache | None) -> None:
        self.split, self.config, self.form, self.cache = split, config, form, cache
        self.rooms = 1
        self._reader: RowReader | None = None
        self._shared: Iterator[Tensor] | None = None

    def _room(self, count: int) -> Tensor:
        """uint8 (count, S, S, C), with a tail as `native.crop_jpeg` wants it: images are made in it one after another."""
        size, channels = self.config.image_size, self.form.channels
        length = count * size * size * channels
        if get_worker_info() is None:
            room = torch.empty(length + TAIL, dtype=torch.uint8)
        else:
            if self._shared is None:
                self._shared = cycle([_shared_bytes(length + TAIL) for _ in range(self.rooms)])
            room = next(self._shared)
        return room[:length].view(count, size, size, channels)

    def _rows(self, ids: npt.NDArray[np.int64]) -> list[Row]:
        if self._reader is None:
            self._reader = open_reader(self.split, self.config.retry_seconds, self.cache)
        rows = self._reader.rows(ids.tolist())
        check_labels(rows, ids, self.form.classes, self.split.where)
        return rows

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reader": None, "_shared": None}


class TrainBatches(_Batches):
    """Training micro-batches of one rank, by (epoch, micro-batch).

    An item's batch is {"image": uint8 (B, C, S, S), "label", "id": int64 (B,) row ids, "seed": int64 (B,)}, or the
    DataError that kept it from being made: raised in a worker it would reach the user as a traceback. A corrupt image
    is replaced, label and all, by the next row that can be decoded; its id stays.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        form: Format,
        cache: GroupCache | None = None,
        *,
        seed: int,
        rank: int,
        world: int,
        accumulate: int,
    ) -> None:
        super().__init__(split, config, form, cache)
        self.seed, self.rank, self.world, self.accumulate = seed, rank, world, accumulate
        per_device_batch(config.global_batch, world, accumulate)
        self._plan = self._plan_of(0)

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self._plan.steps * self.accumulate

    def ids(self, position: Position) -> npt.NDArray[np.int64]:
        """Row ids of the batch at a position; reads nothing."""
        epoch, index = position
        if self._plan.epoch != epoch:
            self._plan = self._plan_of(epoch)
        step, part = divmod(index, self.accumulate)
        return self._plan.micro_batch(step, self.rank, self.world, part, self.accumulate)

    def __getitem__(self, position: Position) -> Item | DataError:
        ids = self.ids(position)
        try:
            rows = self._rows(ids)
            seeds = image_seeds(self.seed, position[0], ids)
            left, encoded = self._left_to_the_device(rows, seeds) if self.config.decode == "gpu" else ((), None)
            here = sorted(set(range(len(rows))) - {image.place for image in left})
            images = self._room(len(rows)) if encoded is None else None
            made: list[Pixels] = []
            corrupt: list[Corrupt] = []
            for i in here:
                out = None if images is None else images[i].numpy()
                rows[i], image = self._whole(rows[i], int(ids[i]), int(seeds[i]), corrupt, out)
                made.append(image)
        except DataError as error:
            return error
        batch = {
            "label": self.form.labels(rows),
            "id": torch.from_numpy(ids),
            "seed": torch.from_numpy(seeds),
        }
        if images is None:
            return Item(batch, corrupt, new_faults(), encoded, left, tuple(made))
        return Item({"image": images.permute(0, 3, 1, 2), **batch}, corrupt, new_faults())

    def on_device(self, item: Item, device: torch.device) -> Item | DataError:
        """An item whose images were left to the device, made whole there.

        What the device's decoder refuses is decoded here on the CPU, and replaced if it is corrupt.
        """
        if item.encoded is None:
            return item
        size, batch, corrupt = self.config.image_size, dict(item.batch), list(item.corrupt)
        shape = (len(batch["id"]), self.form.channels, size, size)
        images = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
        places = sorted(set(range(len(images))) - {image.place for image in item.undecoded})
        if places:
            images[places] = _stack(list(item.cpu_images)).to(device)
        crops = decode_on(device, item.encoded, item.undecoded, size)
        on_cpu = list(item.cpu_images)
        try:
            for image, crop in zip(item.undecoded, crops, strict=True):
                if crop is None:
                    i = image.place
                    row = Row(item.encoded[image.start : image.stop].numpy().tobytes(), ())
                    found, pixels = self._whole(row, int(batch["id"][i]), int(batch["seed"][i]), corrupt)
                    if found is not row:
                        batch["label"][i] = self.form.labels([found])[0]
                    on_cpu.append(pixels)
                    crop = _stack([pixels])[0]
                images[image.place] = crop
        except DataError as error:
            return error
        return Item({"image": images, **batch}, corrupt, item.faults, cpu_images=tuple(on_cpu))

    def _left_to_the_device(
        self, rows: list[Row], seeds: npt.NDArray[np.int64]
    ) -> tuple[tuple[Undecoded, ...], Tensor]:
        """The crops of plain JPEGs, and their bytes; what else there is takes the CPU's way."""
        left, start = [], 0
        for place, (row, seed) in enumerate(zip(rows, seeds.tolist(), strict=True)):
            size = plain_jpeg_size(row.data)
            if size is not None and size[0] * size[1] <= MAX_PIXELS:
                crop = train_crop(self.config, np.random.default_rng(seed), *size)
                left.append(Undecoded(place, start, start + len(row.data), crop))
                start += len(row.data)
        joined = b"".join(rows[image.place].data for image in left)
        return tuple(left), torch.frombuffer(bytearray(joined), dtype=torch.uint8) if left else torch.empty(
            0, dtype=torch.uint8
        )

    def _whole(
        self, row: Row, at: int, seed: int, corrupt: list[Corrupt], out: Pixels | None = None
    ) -> tuple[Row, Pixels]:
        """The row at `at` decoded on the CPU; where it is corrupt, that is noted and another takes its place."""
        decode = partial(_train_image, config=self.config, seed=seed, channels=self.form.channels, out=out)
        image = _decoded(decode, row)
        if not isinstance(image, str):
            return row, image
        corrupt.append(Corrupt(at, image))
        return self._next_whole(at, decode)

    def _next_whole(self, at: int, decode: Callable[[bytes], Pixels]) -> tuple[Row, Pixels]:
        """The replacement of a corrupt image: the next row of the source that can be decoded."""
        for other in range(at + 1, at + 1 + _REPLACEMENTS):
            row = self._rows(np.array([other % self.split.images]))[0]
            image = _decoded(decode, row)
            if not isinstance(image, str):
                return row, image
        raise DataError(
            f"Row {at} of {self.split.where} and the {_REPLACEMENTS} after it cannot be decoded: repair the source."
        )

    def _plan_of(self, epoch: int) -> EpochPlan:
        return EpochPlan(
            self.split.rows,
            seed=self.seed,
            epoch=epoch,
            global_batch=self.config.global_batch,
            window=self.config.shuffle_window,
        )


class EvalBatches(_Batches):
    """Evaluation batches of one rank, by step; every rank has as many.

    A batch is as in training, and "valid": bool (B,): False on rows repeated to fill the batch, not to be counted.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        form: Format,
        cache: GroupCache | None = None,
        *,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        super().__init__(split, config, form, cache)
        self.seed = seed
        self._plan = EvalPlan(split.images, batch=config.eval_batch, rank=rank, world=world)

    def __len__(self) -> int:
        return self._plan.steps

    def __getitem__(self, position: Position) -> Item | DataError:
        ids, valid = self._plan.batch(position[1])
        distinct, where = np.unique(ids, return_inverse=True)
        try:
            rows = self._rows(distinct)
        except DataError as error:
            return error
        images, corrupt = self._room(len(ids)), []
        for place, (row, at) in enumerate(zip(rows, distinct.tolist(), strict=True)):
            out = images[place].numpy()
            image = _decoded(partial(eval_image, config=self.config, channels=self.form.channels, out=out), row)
            if isinstance(image, str):
                corrupt.append(Corrupt(at, image))
                if self.config.val_corrupt == "fail":
                    return DataError(
                        f"Row {at} of {self.split.where} cannot be decoded ({image}): repair it, or leave such images "
                        "out of the metrics with data.val_corrupt: skip."
                    )
                valid = valid & (ids != at)
                out[...] = 0
        for place in range(len(rows), len(ids)):
            images[place] = images[where[place]]
        batch = {
            "image": images.permute(0, 3, 1, 2),
            "label": self.form.labels([rows[i] for i in where]),
            "id": torch.from_numpy(ids),
            "seed": torch.from_numpy(image_seeds(self.seed, 0, ids)),
            "valid": torch.from_numpy(valid),
        }
        return Item(batch, corrupt, new_faults())


def _decoded(decode: Callable[[bytes], Pixels], row: Row) -> Pixels | str:
    """The decoded image, or why there is none."""
    try:
        return decode(row.data)
    except DecodeError as error:
        return str(error)


def _train_image(data: bytes, *, config: DataConfig, seed: int, channels: int, out: Pixels | None) -> Pixels:
    return train_image(data, config, np.random.default_rng(seed), channels, out)


def _shared_bytes(length: int) -> Tensor:
    storage = torch.UntypedStorage._new_shared(length)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload, no-any-return]


def _stack(images: list[Pixels]) -> Tensor:
    """(B, C, S, S) from (S, S, C) images, channels_last in memory: no copy beyond the stacking."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
