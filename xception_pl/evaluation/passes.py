"""One pass over a held-out split with any number of networks, on any number of processes: exact, each image once."""

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xception_pl.data.batches import EvalBatches, Format
from xception_pl.data.config import DataConfig
from xception_pl.data.errors import DataError
from xception_pl.data.item import Batch, Corrupt, Item, Position
from xception_pl.data.loader import PlannedLoader
from xception_pl.data.source import Split
from xception_pl.data.stream import open_cache
from xception_pl.evaluation.scores import Scores, joined, score
from xception_pl.optim.config import Loss
from xception_pl.weights.ready import scaled

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class _Share(EvalBatches):
    """One process' batches: a contiguous range of those that a single process would have.

    `EvalBatches` deals images to ranks before it cuts batches. Here the batches are cut first: a network's output for an
    image may depend in its last bits on the batch around it, and that batch must not depend on the number of processes.
    """

    def __init__(self, split: Split, config: DataConfig, form: Format, *, rank: int, world: int) -> None:
        cache = open_cache(split, config.cache_dir, config.cache_gb, config.retry_seconds)
        super().__init__(split, config, form, cache, seed=0, rank=0, world=1)
        batches = super().__len__()
        self.first, self.stop = rank * batches // world, (rank + 1) * batches // world

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, position: Position) -> Item | DataError:
        return super().__getitem__((0, self.first + position[1]))


@dataclass(frozen=True)
class Subject:
    """A network to be evaluated."""

    logits: Callable[[Tensor], Tensor]
    """Of images (B, C, S, S) in [-1, 1]."""
    class_of_label: npt.NDArray[np.int64]
    """The network's class that each label of the source means."""
    loss: Loss = "cross_entropy"
    """That it was trained with."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass found, over all processes."""

    scores: list[Scores]
    """For each network, in the order of the images. Complete on rank 0 alone."""
    corrupt: list[Corrupt]
    """Images that cannot be decoded, by row."""
    seconds: float
    """From the first batch asked for to the last scored, on the slowest process."""


def run_pass(
    fabric: "Fabric",
    subjects: Sequence[Subject],
    split: Split,
    config: DataConfig,
    *,
    channels: int,
    classes: int,
    advance: Callable[[int], object] = lambda images: None,
) -> Pass:
    """Shows every image of a split once to every network.

    Args:
        fabric: launched; says which process this is, on which device.
        subjects: the networks, in evaluation mode on that device.
        split: what they are evaluated on.
        config: image size, crop, batch and workers; an image that cannot be decoded is left out and listed.
        channels: of the images.
        classes: labels that the source may have.
        advance: told the images of each batch that is done.

    Raises:
        DataError: the source cannot be read.
        ValueError: a network gives NaN.
            Either, found by any process, ends all of them.
    """
    form = Format(channels=channels, classes=classes, multi_label=False)
    share = _Share(split, replace(config, val_corrupt="skip"), form, rank=fabric.global_rank, world=fabric.world_size)
    corrupt: list[Corrupt] = []
    loader = PlannedLoader(
        share, position=lambda: (0, 0), workers=config.workers, prefetch=config.prefetch, on_corrupt=corrupt.extend
    )
    parts: list[list[Scores]] = [[] for _ in subjects]
    began = time.perf_counter()
    error: ValueError | None = None
    try:
        # the same arithmetic in each run: cuDNN's own choice of algorithm, and TensorFloat-32, move the last digits
        with torch.inference_mode(), torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            for batch in loader:
                _score_batch(batch, subjects, parts, fabric.device)
                advance(int(batch["valid"].sum()))
    except ValueError as caught:  # DataError is one: the others must not wait for this process' share for ever
        error = caught
    everyone = _gathered(
        fabric, ([joined(found) for found in parts if found], corrupt, time.perf_counter() - began, error)
    )
    problem = fabric.broadcast(next((problem for *_, problem in everyone if problem is not None), None))
    if problem is not None:
        raise problem
    scores = [joined([shares[i] for shares, *_ in everyone if shares]) for i in range(len(subjects))]
    listed = {image.row: image for _, images, *_ in everyone for image in images}
    return Pass(
        scores=scores,
        corrupt=[listed[row] for row in sorted(listed)],
        seconds=max(seconds for _, _, seconds, _ in everyone),
    )


def _score_batch(batch: Batch, subjects: Sequence[Subject], parts: list[list[Scores]], device: torch.device) -> None:
    images = scaled(batch["image"].to(device, non_blocking=True))
    labels, valid = batch["label"].numpy(), batch["valid"]
    for subject, found in zip(subjects, parts, strict=True):
        of_network = torch.from_numpy(subject.class_of_label[labels])
        logits = subject.logits(images)[valid.to(device)]
        if len(logits):
            found.append(score(logits, of_network[valid], batch["id"][valid], subject.loss))


def _gathered(fabric: "Fabric", mine: Any) -> list[Any]:
    """What every process has, on rank 0; elsewhere a process' own alone."""
    if fabric.world_size == 1:
        return [mine]
    everyone: list[Any] | None = [None] * fabric.world_size if fabric.global_rank == 0 else None
    torch.distributed.gather_object(mine, everyone)
    return everyone if everyone is not None else [mine]


def match_classes(
    source: tuple[str, ...] | None, network: Sequence[str] | None, classes: int, where: str
) -> tuple[npt.NDArray[np.int64], str | None]:
    """The network's class of each label of the source, and what has to be said about it.

    By name where the network has all of the source's names, in whatever order; else by number.

    Args:
        source: names of the source's labels, None where it has numbers.
        network: names that came with the weights.
        classes: outputs of the network.
        where: the source, for messages.

    Raises:
        DataError: the source has more classes than the network.
    """
    if source is not None and network is not None:
        index = {name: i for i, name in enumerate(network)}
        if len(index) == len(network) and set(source) <= set(index):
            found = np.array([index[name] for name in source], np.int64)
            same = list(source) == list(network)
            note = f"labels of {where} are matched to the network's classes by name" if not same else None
            return found, note
    labels = classes if source is None else len(source)
    if labels > classes or (source is not None and network is not None and labels != classes):
        raise DataError(
            f"There are {labels} classes in {where} and {classes} in the network, and their names do not agree: "
            "these weights cannot be evaluated on it."
        )
    note = None
    if source is not None and network is not None:
        first = next(i for i, (one, other) in enumerate(zip(source, network, strict=True)) if one != other)
        note = (
            f"class {first} is {source[first]!r} in {where} and {network[first]!r} in the network: names differ, so "
            "classes are matched by number"
        )
    return np.arange(labels, dtype=np.int64), note


def write_corrupt(path: Path, split: Split, corrupt: Sequence[Corrupt]) -> None:
    """`corrupt.csv` as training writes it: source, row, reason."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(("source", "row", "reason"))
        lines.writerows((split.where, image.row, image.reason) for image in corrupt)
