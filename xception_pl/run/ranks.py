"""The ranks of a job before it trains: they meet, one decides for all, and a mistake of any is said once."""

import atexit
import os
import pickle
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from xception_pl.commands import FAILED, MISTAKE
from xception_pl.recipe import RecipeError
from xception_pl.run.launcher import Launcher

T = TypeVar("T")
_MEET_SECONDS = 600
"""How long the first ranks wait for the last: nodes that read their libraries from a slow file system start minutes apart."""


class Ranks:
    """All processes of a job, through the store that torch's rendezvous opens; alone where nobody started others.

    Args:
        launcher: What started them.
    """

    def __init__(self, launcher: Launcher | None) -> None:
        self.launcher = launcher
        self.rank = 0 if launcher is None else launcher.rank
        self._store: Any = None
        self._calls = 0

    def decide(self, make: Callable[[], T], *mistakes: type[Exception]) -> T:
        """`make()` of each rank, once it has succeeded on all of them.

        Raises:
            RecipeError: on rank 0, with the mistakes (RecipeError, or one of `mistakes`) of all ranks, each sentence once.
            SystemExit: on the others.
        """
        problems: list[str] = []
        try:
            made = make()
        except RecipeError as error:
            problems = error.problems
        except mistakes as error:
            problems = [str(error)]
        everyone = {0: problems} if self.launcher is None else self._exchange(problems)
        if not any(everyone.values()):
            return made
        if self.rank:
            sys.exit(MISTAKE)
        raise RecipeError(_merged(everyone, 1 if self.launcher is None else self.launcher.ranks))

    def first(self, make: Callable[[], T], *mistakes: type[Exception]) -> T:
        """Rank 0's `make()`, on all ranks; fails as `decide` does."""
        made = self.decide(lambda: make() if self.rank == 0 else None, *mistakes)
        if self.launcher is None:
            assert made is not None
            return made
        key = self._next_key()
        if self.rank == 0:
            self._meet().set(key, pickle.dumps(made))
        value: T = pickle.loads(self._meet().get(key))
        return value

    def connect(self, backend: str, seconds: float) -> None:
        """Opens the process group, over the same store; Lightning finds it open and uses it.

        Args:
            backend: nccl or gloo.
            seconds: For which a rank waits for another in a collective operation.
        """
        if self.launcher is None:
            return
        import torch
        from torch import distributed as dist

        device = None
        if backend == "nccl":
            device = torch.device("cuda", self.launcher.local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=dist.distributed_c10d.PrefixStore("xception_pl/group", self._meet()),
            rank=self.launcher.rank,
            world_size=self.launcher.ranks,
            timeout=timedelta(seconds=seconds),
            device_id=device,
        )
        if backend == "nccl":
            atexit.register(_disconnect)  # NCCL warns of groups that are left open

    def _exchange(self, problems: list[str]) -> dict[int, list[str]]:
        """The problems of each rank that has any; to ranks other than 0 only whether there are some."""
        assert self.launcher is not None
        store, key = self._meet(), self._next_key()
        if problems:
            store.set(f"{key}/problems/{self.rank}", pickle.dumps(problems))
            store.add(f"{key}/failed", 1)
        store.set(f"{key}/here/{self.rank}", b"")
        if store.add(f"{key}/arrived", 1) == self.launcher.ranks:
            store.set(f"{key}/all", b"")
        self._wait_for_all(key)
        if not store.add(f"{key}/failed", 0):
            return {}
        if self.rank:
            store.add(f"{key}/told", 1)
            return {self.rank: ["of another rank"]}
        found = {
            rank: pickle.loads(store.get(f"{key}/problems/{rank}"))
            for rank in range(self.launcher.ranks)
            if store.check([f"{key}/problems/{rank}"])
        }
        end = time.monotonic() + 10
        while store.add(f"{key}/told", 0) < self.launcher.ranks - 1 and time.monotonic() < end:
            time.sleep(0.02)  # under srun this process holds the store: it must not end before the others have read
        return found

    def _wait_for_all(self, key: str) -> None:
        assert self.launcher is not None
        end = time.monotonic() + _MEET_SECONDS
        while not self._store.check([f"{key}/all"]):  # asked, not waited for: signals are handled in between
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
            missing = [rank for rank in range(self.launcher.ranks) if not self._store.check([f"{key}/here/{rank}"])]
            here = next(rank for rank in range(self.launcher.ranks) if rank not in missing)
            if self.rank == here:  # one is enough to say it
                print(f"error: {_named(missing)} did not come within {_MEET_SECONDS} s.", file=sys.stderr, flush=True)
            sys.exit(FAILED)

    def _next_key(self) -> str:
        self._calls += 1
        return f"xception_pl/{self._calls}"

    def _meet(self) -> Any:
        if self._store is None:
            assert self.launcher is not None
            self._store = _of_this_start(_open_store(self.launcher), self.launcher)
        return self._store


def _disconnect() -> None:
    from torch import distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _of_this_start(store: Any, launcher: Launcher) -> Any:
    """The part of a store that belongs to this start of the ranks alone.

    torchrun 2.15 keeps one store for all its starts: counters and addresses of processes that are gone would be taken for
    those of living ones. Nothing in the environment tells the starts apart on all nodes. So each process makes itself a
    name; rank 0 answers to the names it finds, old ones too, until each rank has confirmed this start's.
    """
    from torch.distributed import distributed_c10d

    mine = uuid.uuid4().hex
    end = time.monotonic() + _MEET_SECONDS
    missing = list(range(1, launcher.ranks)) if launcher.rank == 0 else [0]
    if launcher.rank:
        store.set(f"xception_pl/name/{launcher.rank}", mine)
    while missing and time.monotonic() < end:
        if launcher.rank == 0:
            for rank in missing:
                if store.check([f"xception_pl/name/{rank}"]):
                    name = store.get(f"xception_pl/name/{rank}").decode()
                    store.set(f"xception_pl/answer/{name}", mine)
            missing = [rank for rank in missing if not store.check([f"xception_pl/{mine}/{rank}"])]
        elif store.check([f"xception_pl/answer/{mine}"]):
            start = store.get(f"xception_pl/answer/{mine}").decode()
            store.set(f"xception_pl/{start}/{launcher.rank}", b"")
            return distributed_c10d.PrefixStore(start, store)
        if missing:
            time.sleep(0.05)  # and not in the store: signals are handled in between
    if missing:
        raise RecipeError([f"{_named(missing)} did not come within {_MEET_SECONDS} s."])
    return distributed_c10d.PrefixStore(mine, store)


def _open_store(launcher: Launcher) -> Any:
    """The rendezvous store: torchrun's own, or, under srun, one that rank 0 holds on the first node."""
    from torch.distributed import DistError
    from torch.distributed.rendezvous import rendezvous

    if launcher.name == "srun":
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        # As Lightning counts them; of the step, not of the job around it.
        os.environ["SLURM_NTASKS_PER_NODE"], os.environ["SLURM_NNODES"] = (
            str(launcher.ranks_per_node),
            str(launcher.nodes),
        )
        slurm = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm.main_address, str(slurm.main_port)
    try:
        store, _, _ = next(
            rendezvous("env://", launcher.rank, launcher.ranks, timeout=timedelta(seconds=_MEET_SECONDS))
        )
    except DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RecipeError(
            [
                f"rank {launcher.rank} could not meet the others at {where} (MASTER_ADDR, MASTER_PORT): {_first_line(error)}"
            ]
        ) from error
    return store


def _merged(everyone: dict[int, list[str]], ranks: int) -> list[str]:
    """Each sentence once, with the ranks that said it where not all did."""
    said: dict[str, list[int]] = {}
    for rank, problems in everyone.items():
        for problem in problems:
            said.setdefault(problem, []).append(rank)
    return [problem if len(who) == ranks else f"{_named(who)}: {problem}" for problem, who in said.items()]


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
