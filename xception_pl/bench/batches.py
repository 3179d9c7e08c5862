"""Batches through the loaders, by the clock: each loader in a process of its own, so that all begin alike and wait idle.

Ours reads local Parquet, and the loopback hub with an empty cache and a full one; timm's reads a folder of the same images.
"""

import contextlib
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from xception_pl.bench.crops import SIZE
from xception_pl.bench.loopback import LoopbackHub

if TYPE_CHECKING:
    from xception_pl.data.loader import PlannedLoader

BATCH = 32
PREFETCH = 4  # batches a worker holds ready
ROWS = 2048  # images of the set: the given ones over and over

Batches = Callable[..., Iterator[int]]
"""Makes a loader and gives the sizes of its training batches, without end."""


class Loader:
    """Some batches, in a process that makes nothing while it is not asked: its workers have filled their queues then."""

    def __init__(self, batches: Batches, *arguments: Any, ahead: int = 0) -> None:
        context = multiprocessing.get_context("spawn")  # so that HF_ENDPOINT is there before the hub's client
        self.ahead = ahead
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_give, args=(theirs, batches, arguments))
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._ours.send(None)
        self._process.join(30)
        self._process.kill()

    def ask(self, batches: int) -> None:
        """Have it make so many batches now, after those that were made ahead."""
        self._ours.send((self.ahead, batches))

    def answer(self) -> tuple[int, float]:
        """Images and seconds of what was asked for.

        Raises:
            RuntimeError: it failed; its traceback is on standard error.
        """
        try:
            images, seconds = self._ours.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("a loader of the benchmark failed") from error
        return images, seconds


def _give(connection: Connection, batches: Batches, arguments: tuple[Any, ...]) -> None:
    as_any_process()
    made = batches(*arguments)
    while (asked := connection.recv()) is not None:
        ahead, count = asked
        for _ in range(ahead):
            next(made)
        start = time.perf_counter()
        images = sum(next(made) for _ in range(count))
        connection.send((images, time.perf_counter() - start))
    os._exit(0)  # without waiting for the workers' last batches


def as_any_process() -> None:
    """Let a process that was spawned start its workers as others do, and have one thread."""
    import torch

    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)


def rates(contents: list[bytes], workers: int, scratch: Path, turns: int) -> dict[str, float]:
    """Images a second of each loader: the median over the turns, in which they are asked one after another.

    `N processes` are as many loaders without workers side by side, which share nothing but the machine: what N workers
    could give at best.
    """
    repeated = (contents * (ROWS // len(contents) + 1))[:ROWS]
    parquet = write_parquet(repeated, scratch / "parquet" / "data")
    folder = write_folder(repeated, scratch / "folder")
    count, ahead = ROWS // BATCH // 2, PREFETCH * workers
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(LoopbackHub(parquet))

        def loader(batches: Batches, *arguments: Any, ahead: int = 0) -> list[Loader]:
            return [stack.enter_context(Loader(batches, *arguments, ahead=ahead))]

        local = str(parquet)
        side_by_side = [loader(our_batches, local, 0)[0] for _ in range(workers)]
        loaders = {
            "one process": side_by_side[:1],
            f"{workers} processes": side_by_side,
            f"{workers} workers, local Parquet": loader(our_batches, local, workers, ahead=ahead),
            f"timm, {workers} workers": loader(timm_batches, str(folder), workers, ahead=ahead),
        }
        with at_hub(hub, scratch / "hub home"):
            later = f"{workers} workers, loopback hub, later epochs"
            loaders[f"{workers} workers, loopback hub, first epoch"] = loader(
                first_epochs, hub.repo, workers, str(scratch / "emptied"), ahead=1
            )
            loaders[later] = loader(our_batches, hub.repo, workers, str(scratch / "kept"), ahead=ahead)
        _together(loaders[later], ROWS // BATCH)  # fills its cache
        for turn in range(turns + 1):
            for name, some in loaders.items():
                images, seconds = _together(some, ROWS // BATCH - 1 if "first epoch" in name else count)
                if turn:
                    found.setdefault(name, []).append(images / seconds)
                time.sleep(
                    1.5 * (some[0].ahead * BATCH) * seconds / images
                )  # while its workers fill their queues again
    return {name: statistics.median(values) for name, values in found.items()}


def _together(loaders: list[Loader], batches: int) -> tuple[int, float]:
    for loader in loaders:
        loader.ask(batches)
    answers = [loader.answer() for loader in loaders]
    return sum(images for images, _ in answers), max(seconds for _, seconds in answers)


@contextlib.contextmanager
def at_hub(hub: LoopbackHub, home: Path) -> Iterator[None]:
    """Processes that start in here have the loopback hub for the hub, and a home of their own."""
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def write_parquet(contents: list[bytes], folder: Path) -> Path:
    """The images as a data set of one split in two files, in row groups of 100 as on the hub; the folder of the set."""
    import datasets

    datasets.disable_progress_bars()
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["none"])})
    for shard in range(2):
        some = contents[shard * len(contents) // 2 : (shard + 1) * len(contents) // 2]
        rows = {"image": [{"bytes": data, "path": None} for data in some], "label": [0] * len(some)}
        name = f"train-{shard:05d}-of-00002.parquet"
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / name, batch_size=100)
    return folder.parent


def write_folder(contents: list[bytes], folder: Path) -> Path:
    """The images as files of one class."""
    (folder / "none").mkdir(parents=True)
    for number, data in enumerate(contents):
        (folder / "none" / f"{number:05d}.jpg").write_bytes(data)
    return folder


def our_batches(source: str, workers: int, cache_dir: str | None = None) -> Iterator[int]:
    """Sizes of the training batches of `ImageNetDataModule`, epoch after epoch."""
    epoch = 0
    loader = _loader(source, workers, cache_dir)
    loader.position = lambda: (epoch, 0)  # as a trainer goes on: the workers do not stop between epochs
    while True:
        for batch in loader:
            yield len(batch["image"])
        epoch += 1


def first_epochs(source: str, workers: int, folder: str) -> Iterator[int]:
    """The same, but each epoch is a new run's first, with an empty cache."""
    for run in itertools.count():
        for batch in _loader(source, workers, f"{folder}/{run}"):
            yield len(batch["image"])


def _loader(source: str, workers: int, cache_dir: str | None) -> "PlannedLoader":
    from xception_pl.data.config import DataConfig
    from xception_pl.data.datamodule import ImageNetDataModule

    config = DataConfig(
        source=source, global_batch=BATCH, workers=workers, prefetch=PREFETCH, image_size=SIZE, cache_dir=cache_dir
    )
    module = ImageNetDataModule(config)
    module.prepare(val=False)
    return module.train_dataloader()


def timm_batches(folder: str, workers: int) -> Iterator[int]:
    """Sizes of the training batches of timm's default loader, without end."""
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", folder, is_training=True),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        num_workers=workers,
        use_prefetcher=False,
        pin_memory=False,
    )
    while True:
        for images, _ in loader:
            yield len(images)
