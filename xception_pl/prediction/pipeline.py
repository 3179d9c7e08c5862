"""Pictures through the network: read and decoded by threads while it computes, results in the order of the input."""

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from xception_pl.data.decode import DecodeError, Pixels
from xception_pl.data.errors import DataError
from xception_pl.nets.probabilities import probabilities
from xception_pl.optim.config import Loss
from xception_pl.prediction.pictures import Picture
from xception_pl.weights.ready import Prepare, scaled, stacked

_AHEAD_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one picture: results, or the reason why there are none."""

    name: str
    problem: str | None = None
    classes: tuple[int, ...] = ()
    """The likeliest first."""
    probabilities: tuple[float, ...] = ()
    features: Tensor | None = None
    """(F,) float32."""
    pixels: Pixels | None = None
    """What the network saw, (S, S, C) uint8, where a heat map belongs to it."""
    heat: Tensor | None = None
    """(h, w) in [0, 1]: the heat map of the likeliest class."""


@dataclass(frozen=True)
class Output:
    """What a network says about a batch."""

    logits: Tensor
    features: Tensor | None = None
    heat: Tensor | None = None


def outcomes(
    pictures: Iterable[Picture],
    prepare: Prepare,
    network: Callable[[Tensor], Output],
    *,
    device: torch.device,
    batch: int = 32,
    workers: int = 2,
    top: int = 5,
    loss: Loss = "cross_entropy",
    fill: bool = False,
) -> Iterator[Outcome]:
    """One outcome a picture, in their order.

    Threads, not processes: the decoder and Pillow hold no lock of Python's while they work, a thread starts in no time,
    and its pixels need no copy to another process.

    Args:
        pictures: read lazily, some batches ahead.
        prepare: bytes to pixels.
        network: output for float32 (B, C, S, S) in [-1, 1] on `device`.
        device: of the network.
        batch: images it sees at once.
        workers: decoding threads.
        top: classes an outcome names.
        loss: that the network was trained with: how its logits become probabilities.
        fill: fill the last batch up with its last image: for a compiled network, which a new size would compile again.
    """

    def answered(waiting: list[tuple[str, Pixels | str]]) -> Iterator[Outcome]:
        good = [pixels for _, pixels in waiting if not isinstance(pixels, str)]
        results = iter(_results(good, network, device, batch if fill else len(good), top, loss)) if good else iter(())
        for name, pixels in waiting:
            if isinstance(pixels, str):
                yield Outcome(name=name, problem=pixels)
            else:
                classes, probabilities, features, heat = next(results)
                yield Outcome(
                    name=name,
                    classes=classes,
                    probabilities=probabilities,
                    features=features,
                    pixels=None if heat is None else pixels,
                    heat=heat,
                )

    waiting: list[tuple[str, Pixels | str]] = []
    good = 0
    for name, pixels in _decoded(pictures, prepare, workers, batch * _AHEAD_BATCHES):
        waiting.append((name, pixels))
        good += not isinstance(pixels, str)
        if good in (0, batch):  # what is bad waits for nothing but the good ones before it
            yield from answered(waiting)
            waiting, good = [], 0
    yield from answered(waiting)


def _decoded(
    pictures: Iterable[Picture], prepare: Prepare, workers: int, ahead: int
) -> Iterator[tuple[str, Pixels | str]]:
    """Names and pixels in order, or for want of them the reason; `ahead` pictures are in work."""
    source = iter(pictures)
    # Pillow's warnings about odd files: silenced here for all threads, whose own attempts to do so would cross.
    with warnings.catch_warnings(), ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        warnings.simplefilter("ignore")
        queue: deque[tuple[str, Future[Pixels | str]]] = deque()
        try:
            for picture in source:
                queue.append((picture.name, pool.submit(_pixels, picture, prepare)))
                if len(queue) > ahead:
                    name, future = queue.popleft()
                    yield name, future.result()
            while queue:
                name, future = queue.popleft()
                yield name, future.result()
        finally:
            for _, future in queue:
                future.cancel()


def _pixels(picture: Picture, prepare: Prepare) -> Pixels | str:
    try:
        return prepare(picture.read())
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (DecodeError, DataError) as error:
        return str(error)


def _results(
    pixels: list[Pixels],
    network: Callable[[Tensor], Output],
    device: torch.device,
    size: int,
    top: int,
    loss: Loss,
) -> Iterator[tuple[tuple[int, ...], tuple[float, ...], Tensor | None, Tensor | None]]:
    images = stacked(pixels + [pixels[-1]] * (size - len(pixels)))
    output = network(scaled(images.to(device, non_blocking=True)))
    # ranked by logits: sigmoids near 1 are equal long before these are
    likeliest = output.logits.float().sort(dim=1, descending=True, stable=True).indices[:, :top]
    values = probabilities(output.logits, loss).gather(1, likeliest).tolist()
    classes = likeliest.tolist()
    features = None if output.features is None else output.features.float().cpu()
    heat = None if output.heat is None else output.heat.float().cpu()
    for i in range(len(pixels)):
        yield (
            tuple(classes[i]),
            tuple(values[i]),
            None if features is None else features[i],
            None if heat is None else heat[i],
        )


def chained(sources: Iterable[Iterable[Picture]]) -> Iterator[Picture]:
    """The pictures of all sources, one after the other."""
    return itertools.chain.from_iterable(sources)
