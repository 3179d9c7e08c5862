"""One process a node that fills the cache ahead of the ranks' use."""

import ctypes
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import SynchronizedArray

import torch.multiprocessing as mp

from xception_pl.data.cache import GroupCache
from xception_pl.data.errors import DataError
from xception_pl.data.fetch import new_faults
from xception_pl.data.plan import EpochPlan, Ids

_CONNECTIONS = 8  # row groups fetched at a time by a node
_PAUSE = 0.02  # seconds between looks at where the training is

_log = logging.getLogger(__name__)


class NodeNeeds:
    """What the ranks of one node read."""

    def __init__(
        self, rows: Ids, *, seed: int, global_batch: int, window: int, rank: int, ranks: int, world: int
    ) -> None:
        self._rows, self._seed, self._global_batch, self._window = rows, seed, global_batch, window
        self._rank, self._ranks, self._world = rank, ranks, world

    def __call__(self, epoch: int, step: int) -> tuple[Ids, Ids]:
        """Row groups needed from a step of an epoch on, in order, and before which step each."""
        plan = EpochPlan(self._rows, seed=self._seed, epoch=epoch, global_batch=self._global_batch, window=self._window)
        return plan.groups_needed(step, self._rank, self._world, self._ranks)


class FillAhead:
    """Fetches the row groups of the coming steps, `steps` of them at most, so that the cache need not hold an epoch.

    What it cannot fetch it leaves to the readers, who report it.

    Args:
        cache: to fill.
        needs: the plan.
        epoch_steps: optimiser steps an epoch.
        steps: how far ahead of the training.
    """

    def __init__(self, cache: GroupCache, needs: NodeNeeds, epoch_steps: int, steps: int) -> None:
        context = mp.get_context()
        self._at: SynchronizedArray[int] = context.Array("q", [-1, -1])
        self._faults: SimpleQueue[dict[str, int]] = context.SimpleQueue()
        self._process = context.Process(
            target=_run, args=(cache, needs, epoch_steps, steps, self._at, self._faults, os.getpid()), daemon=True
        )
        self._process.start()

    def training_at(self, epoch: int, step: int) -> None:
        """Say where the training is; cheap enough for every step."""
        with self._at.get_lock():
            self._at[0], self._at[1] = epoch, step

    def faults(self) -> dict[str, int]:
        """Its reads that failed and were tried again since the last call, by kind."""
        told: Counter[str] = Counter()
        while not self._faults.empty():
            told.update(self._faults.get())
        return dict(told)

    def close(self) -> None:
        """End the process, in the middle of a fetch too: the cache bears it."""
        self._process.kill()
        self._process.join()


def _run(
    cache: GroupCache,
    needs: NodeNeeds,
    epoch_steps: int,
    steps: int,
    at: "SynchronizedArray[int]",
    faults: "SimpleQueue[dict[str, int]]",
    parent: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's handler came along with the fork
    _end_with(parent)
    pending: set[Future[None]] = set()
    begun = None
    coming: Iterator[tuple[int, int, int]] = iter(())
    following = None

    def fetch(group: int) -> None:
        try:
            cache.fill(group)
        except (DataError, OSError) as error:
            _log.debug("Row group %d is left to its readers: %s", group, error)

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        while os.getppid() == parent:
            if new := new_faults():
                faults.put(new)
            epoch, step = at[0], at[1]
            now = epoch * epoch_steps + step
            if epoch >= 0 and (begun is None or not begun <= now <= begun + epoch_steps):
                # at the start, after a jump, and an epoch later, to fetch again what was cleared since
                coming, following, begun = _coming(needs, epoch, step), None, now
            following = following or next(coming, None)
            if (
                following is None
                or len(pending) >= _CONNECTIONS
                or following[0] * epoch_steps + following[1] > now + steps
            ):
                if pending:
                    pending = wait(pending, timeout=_PAUSE, return_when=FIRST_COMPLETED).not_done
                else:
                    time.sleep(_PAUSE)
                continue
            if not cache.has(following[2]):  # most are there after the first epoch: no thread is woken for them
                pending.add(pool.submit(fetch, following[2]))
            following = None


def _coming(needs: NodeNeeds, epoch: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, step, row group), without end."""
    while True:
        groups, steps = needs(epoch, step)
        for group, before in zip(groups.tolist(), steps.tolist(), strict=True):
            yield epoch, before, group
        epoch, step = epoch + 1, 0


def _end_with(parent: int) -> None:
    """Let the kernel end this process with its parent, however that ends (Linux; elsewhere the loop notices)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:
        os._exit(0)
