"""Loader workers as processes: killed ones are an error, none outlive the run, memory stays flat."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.test_hub import write_set
from tests.data.tracing import table
from xception_pl.data.config import DataConfig
from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.data.errors import DataError


def config(**changes: object) -> DataConfig:
    made = {"image_size": 71, "train_crop": "resize", "flip": False, "global_batch": 10, "workers": 2}
    return DataConfig(**{**made, **changes})  # type: ignore[arg-type]


def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    others = set(multiprocessing.active_children())
    batches = iter(ImageNetDataModule(config(prefetch=1), train=table(1000)).train_dataloader())
    next(batches)
    victims = [child for child in multiprocessing.active_children() if child not in others]
    assert len(victims) == 2
    assert victims[0].pid is not None
    os.kill(victims[0].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"loader worker was killed.*data.workers.*\.$"):
        for _ in batches:
            pass
    assert time.monotonic() - start < 30


PARENT = """
import os, sys, time, multiprocessing
from xception_pl.data.config import DataConfig
from xception_pl.data.datamodule import ImageNetDataModule
config = DataConfig(source=sys.argv[1], image_size=71, global_batch=10, workers=2, cache_dir=sys.argv[2])
data = ImageNetDataModule(config)
data._split("train").__dict__["remote"] = True  # so that the cache and its process are used
batches = iter(data.train_dataloader())
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_workers_and_fetcher_end_with_a_killed_parent(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    command = [sys.executable, "-c", PARENT, str(tmp_path / "set"), str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 3
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() and alive(pid) for pid in children):
        assert time.monotonic() < end, "children outlive their parent"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def resident(pid: int) -> int:
    """Bytes of a process's own memory: mapped files, the shared page cache, are not its own."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_flat_over_epochs(tmp_path: Path, workers: int) -> None:
    write_set(tmp_path / "set")
    data = ImageNetDataModule(
        config(source=str(tmp_path / "set"), workers=workers, cache_dir=str(tmp_path / "cache"), shuffle_window=64)
    )
    data._split("train").__dict__["remote"] = True
    loader = data.train_dataloader()
    sizes = []
    for epoch in range(6):
        loader.position = lambda epoch=epoch: (epoch, 0)
        for _ in loader:
            pass
        pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
        sizes.append(sum(map(resident, pids)))
    data.teardown()
    assert max(sizes[2:]) - sizes[1] < 16 * 2**20, sizes
