"""The loader that Lightning iterates: finite, without state of its own, always where the trainer is."""

import atexit
import functools
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.synchronize import Event
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from xception_pl.data.batches import EvalBatches, TrainBatches
from xception_pl.data.errors import DataError
from xception_pl.data.item import Batch, Corrupt, Item, Position


class PlannedLoader:
    """Iterates a rank's batches from the position that `position()` gives when the first batch is asked for.

    Not a `DataLoader`, so that Lightning adds no sampler of its own; inside it is one, whose workers run through the
    epochs without a pause: they load the next epoch's first batches while the last ones are trained on. When the
    position is not the one they are at (a resume, an epoch cut short), they are sent there.

    Its `state_dict` holds no position (the trainer's own progress is that, the same on every rank) but what the order
    depends on, to refuse a resume that would continue another order.

    Args:
        batches: items by (epoch, index).
        position: (epoch, index) of the next batch.
        workers: processes; 0 loads in this one.
        prefetch: batches a worker holds ready.
        order: what the order is a function of, by name.
        accumulate: micro-batches an optimiser step, kept beside them: a resume may change it.
        on_resume: told the checkpoint's `accumulate` when the run goes on inside an epoch.
        new_epoch: whether the checkpoint was saved when an epoch was done, so that any order may follow.
        endless: whether workers go on into the next epoch.
        on_faults: told the reads that failed and were tried again, by kind.
        on_batch: told the position of each batch taken.
        on_corrupt: told of images that could not be decoded; may raise.
        finish: does in this process what workers cannot do to an item.
    """

    def __init__(
        self,
        batches: TrainBatches | EvalBatches,
        *,
        position: Callable[[], Position],
        workers: int,
        prefetch: int,
        order: Mapping[str, int | str] | None = None,
        accumulate: int = 1,
        on_resume: Callable[[int], None] | None = None,
        new_epoch: Callable[[], bool] | None = None,
        endless: bool = False,
        on_faults: Callable[[Mapping[str, int]], None] | None = None,
        on_batch: Callable[[Position], None] | None = None,
        on_corrupt: Callable[[list[Corrupt]], None] | None = None,
        finish: Callable[[Item], Item | DataError] | None = None,
    ) -> None:
        self.batches = batches
        self.position = position
        self._order = dict(order or {})
        self._accumulate, self._on_resume, self._new_epoch = accumulate, on_resume, new_epoch
        self._on_faults, self._on_batch, self._on_corrupt = on_faults, on_batch, on_corrupt
        self._finish = finish
        self._ending = torch.multiprocessing.get_context().Event()
        self._sampler = _From(len(batches), endless)
        self._loader: DataLoader[Any] = DataLoader(
            batches,
            batch_size=None,
            sampler=self._sampler,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=functools.partial(_leave_signals_to_the_trainer, (_closing(), self._ending))
            if workers
            else None,
        )
        batches.rooms = prefetch + 1  # DataLoader lets a worker be `prefetch` batches ahead, and one is being copied
        self._mapped: deque[Any] = deque(maxlen=workers * batches.rooms)  # workers' rooms: mapped once while held here
        self._iterator: Iterator[Any] | None = None  # under this name Lightning finds and stops the workers
        self._next: Position | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        epoch, index = self.position()  # a generator: not before the first batch is asked for
        while index < len(self):
            batch = self._take((epoch, index))
            index += 1
            yield batch

    def _take(self, position: Position) -> Batch:
        if self._on_batch is not None:
            self._on_batch(position)
        if self._iterator is None or self._next != position:
            self._sampler.start = position
            self._iterator = iter(self._loader)
            if self._loader.num_workers and threading.current_thread() is threading.main_thread():
                # torch's handler raises for a dead worker wherever the trainer is, in the middle of a save too; without
                # it the next batch raises, within five seconds.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        epoch, index = position
        self._next = (epoch, index + 1) if index + 1 < len(self) else (epoch + 1, 0)
        try:
            item: Item | DataError = next(self._iterator)
        except (RuntimeError, EOFError, ConnectionError) as error:  # the latter two while it was handing over a batch
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "A loader worker was killed, by the system if memory ran out: lower data.workers, data.prefetch or "
                "data.shuffle_window."
            ) from error
        if isinstance(item, Item) and self._loader.num_workers and not self._loader.pin_memory:
            self._mapped.append(item.batch.get("image"))
            item = item.copied()  # before the worker, asked for another batch by now, makes the one after that
        if self._finish is not None and isinstance(item, Item):
            item = self._finish(item)
        if isinstance(item, DataError):
            self._end_workers()
            raise item
        if item.faults and self._on_faults is not None:
            self._on_faults(item.faults)
        if item.corrupt and self._on_corrupt is not None:
            self._on_corrupt(item.corrupt)
        return item.batch

    def _end_workers(self) -> None:
        """Now, not after their reads: against a source that does not answer these last for minutes."""
        self._ending.set()
        for worker in getattr(self._iterator, "_workers", ()):
            worker.terminate()

    def state_dict(self) -> dict[str, int | str]:
        return {**self._order, "accumulate": self._accumulate}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Check that an epoch begun elsewhere can go on here.

        Raises:
            DataError: when its order was another; names what differs.
        """
        if self._new_epoch is not None and self._new_epoch():
            return
        differ = [f"{key} {state[key]}, now {now}" for key, now in self._order.items() if state.get(key, now) != now]
        if differ:
            raise DataError(
                f"The checkpoint is inside an epoch whose order was made with {'; '.join(differ)}: "
                "resume with the same values, or from the end of an epoch."
            )
        if self._on_resume is not None:
            self._on_resume(int(state.get("accumulate", self._accumulate)))


@functools.cache
def _closing() -> Event:
    """An event that is set when this process ends, before its children are told to."""
    event = torch.multiprocessing.get_context().Event()
    atexit.register(event.set)  # multiprocessing registered its own, which ends the workers, earlier: it runs later
    return event


def _leave_signals_to_the_trainer(ends: tuple[Event, ...], worker: int) -> None:
    """A worker's signals: Ctrl-C and a scheduler's SIGTERM go to every process, and the trainer needs workers to save.

    A worker ends when it is told so, when its parent is gone (torch looks), or on SIGTERM once one of `ends` is set.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if any(end.is_set() for end in ends) else None)


class _From(Sampler[Position]):
    """Positions from `start` on."""

    def __init__(self, length: int, endless: bool) -> None:
        self.start: Position = (0, 0)
        self._length, self._endless = length, endless

    def __iter__(self) -> Iterator[Position]:
        first, index = self.start
        for epoch in itertools.count(first) if self._endless else (first,):
            for i in range(index, self._length):
                yield epoch, i
            index = 0


def _as_is(batch: Any) -> Any:
    """A batch is made whole in the worker: nothing to collate."""
    return batch
