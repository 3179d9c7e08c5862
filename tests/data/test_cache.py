"""The local cache: bounded, shared without doubled reads, safe against kill -9, full disks and other jobs."""

import errno
import functools
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.test_stream import write_parquet
from tests.data.tracing import png
from xception_pl.data import cache as cache_module
from xception_pl.data.ahead import FillAhead, NodeNeeds
from xception_pl.data.cache import GroupCache
from xception_pl.data.errors import DataError
from xception_pl.data.plan import EpochPlan
from xception_pl.data.source import ParquetSplit, open_split
from xception_pl.data.stream import ParquetReader, read_group

ROWS, GROUP = 210, 7
GROUPS = ROWS // GROUP


@pytest.fixture
def split(tmp_path: Path) -> ParquetSplit:
    write_parquet(tmp_path / "set", "train.parquet", range(ROWS), group=GROUP)
    opened = open_split(str(tmp_path / "set"), "train")
    assert isinstance(opened, ParquetSplit)
    return opened


def files(folder: Path, kind: str = "arrow") -> list[Path]:
    return list(folder.glob(f"*/*.{kind}"))


def logged(log: Path, split: ParquetSplit, group: int, retry_seconds: float) -> pa.Table:
    """Reads a row group slowly and leaves a line for each read."""
    with log.open("a") as file:
        file.write(f"{group}\n")
    time.sleep(0.01)
    return read_group(split, group)


def all_rows(cache: GroupCache, split: ParquetSplit) -> None:
    reader = ParquetReader(split, cache.table, memory_bytes=1)
    for i in range(ROWS):
        assert reader.rows([i])[0].data == png(i)


def test_every_row_comes_through_the_cache_and_is_read_once(tmp_path: Path, split: ParquetSplit) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        all_rows(GroupCache(tmp_path / "cache", 10**9, split, functools.partial(logged, log)), split)
    assert sorted(map(int, log.read_text().split())) == list(range(GROUPS))
    assert len(files(tmp_path / "cache")) == GROUPS


def test_the_folder_stays_below_its_limit_and_the_longest_unused_go_first(tmp_path: Path, split: ParquetSplit) -> None:
    cache = GroupCache(tmp_path / "cache", 10**9, split, read_group)
    cache.fill(0)
    size = files(tmp_path / "cache")[0].stat().st_size
    small = GroupCache(tmp_path / "small", 6 * size, split, read_group)
    for group in range(GROUPS):
        small.table(0)
        small.table(group)
        assert sum(file.stat().st_size for file in files(tmp_path / "small")) <= 6 * size
    assert small.has(0)
    assert small.has(GROUPS - 1)
    assert not small.has(1)
    all_rows(small, split)


@pytest.mark.parametrize("room", [0.5, 1.5, 3.5], ids="room for {} groups".format)
def test_many_readers_of_a_small_folder_all_get_their_rows(
    tmp_path: Path, split: ParquetSplit, room: float, caplog: pytest.LogCaptureFixture
) -> None:
    def wide(
        split: ParquetSplit, group: int, retry_seconds: float
    ) -> pa.Table:  # writing it takes long enough for others to come between
        return pa.table({"image": pa.array([bytes([group]) * 2**20]), "label": pa.array([group])})

    small = GroupCache(tmp_path / "cache", int(room * 2**20), split, wide)
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda i: small.table(i % GROUPS), range(5 * GROUPS)))
    assert [table["label"][0].as_py() for table in tables] == [i % GROUPS for i in range(5 * GROUPS)]
    assert sum(file.stat().st_size for file in files(tmp_path / "cache")) <= small.limit_bytes
    assert files(tmp_path / "cache", "tmp") == []
    if room < 1:
        assert files(tmp_path / "cache") == []
        assert caplog.messages[0].startswith("No room in")
    else:
        assert files(tmp_path / "cache")


def test_processes_share_one_download(tmp_path: Path, split: ParquetSplit) -> None:
    log = tmp_path / "log"
    cache = GroupCache(tmp_path / "cache", 10**9, split, functools.partial(logged, log))
    readers = [multiprocessing.get_context("fork").Process(target=all_rows, args=(cache, split)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert sorted(map(int, log.read_text().split())) == list(range(GROUPS))


def stuck(started: Any, split: ParquetSplit, group: int, retry_seconds: float) -> pa.Table:
    started.set()
    time.sleep(60)
    raise AssertionError("killed before")


def test_a_reader_killed_while_it_fetches_blocks_nobody(tmp_path: Path, split: ParquetSplit) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    dying = GroupCache(tmp_path / "cache", 10**9, split, functools.partial(stuck, started))
    victim = context.Process(target=dying.fill, args=(3,))
    victim.start()
    assert started.wait(10)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    all_rows(GroupCache(tmp_path / "cache", 10**9, split, read_group), split)


def test_who_waited_for_another_that_tried_tries_for_the_rest_of_the_time(tmp_path: Path, split: ParquetSplit) -> None:
    """Else a node's readers would try one after the other, for as long each, and outlast the watch over the ranks."""
    tries: list[float] = []

    def away(split: ParquetSplit, group: int, retry_seconds: float) -> pa.Table:
        tries.append(retry_seconds)
        raise DataError("away")

    cache = GroupCache(tmp_path / "cache", 10**9, split, away, retry_seconds=0.01)
    with ThreadPoolExecutor(1) as pool:
        with cache_module._locked(cache._path(3).with_suffix(".lock")):
            waits = pool.submit(cache.table, 3)
            time.sleep(1)
        assert str(waits.exception(20)) == "away"
    assert tries == [0.0]  # once
    cache.retry_seconds = 100.0
    with pytest.raises(DataError, match="away"):
        cache.table(3)
    assert 90 < tries[1] <= 100


def test_what_dead_processes_left_is_cleared_and_torn_files_are_made_again(tmp_path: Path, split: ParquetSplit) -> None:
    cache = GroupCache(tmp_path / "cache", 10**9, split, read_group)
    cache.fill(0)
    (whole,) = files(tmp_path / "cache")
    good = whole.read_bytes()
    for torn in (good[: len(good) // 2], b"", b"\0" * len(good)):
        whole.write_bytes(torn)
        assert cache.table(0).equals(read_group(split, 0))
    left = whole.with_suffix(".1.tmp")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    cache.limit_bytes = 3 * len(good) // 2
    cache.fill(1)
    assert not left.exists()


def test_a_full_disk_only_costs_another_read(
    tmp_path: Path, split: ParquetSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full in the middle of a file, as disks are."""

    def full(table: pa.Table, file: Any) -> None:
        write(table, file)
        if not isinstance(file, pa.MockOutputStream):
            file.truncate(file.tell() // 2)
            raise OSError(errno.ENOSPC, "No space left on device")

    cache = GroupCache(tmp_path / "cache", 10**9, split, read_group)
    cache.fill(0)
    write = cache_module._write_arrow
    monkeypatch.setattr(cache_module, "_write_arrow", full)
    all_rows(cache, split)
    assert files(tmp_path / "cache", "tmp") == []


@pytest.mark.parametrize("torn", ["", "12a"])
def test_a_torn_count_of_bytes_is_counted_again(tmp_path: Path, split: ParquetSplit, torn: str) -> None:
    cache = GroupCache(tmp_path / "cache", 10**9, split, read_group)
    for group in range(4):
        cache.fill(group)
    size = max(file.stat().st_size for file in files(tmp_path / "cache"))
    (tmp_path / "cache/bytes").write_text(torn)
    small = GroupCache(tmp_path / "cache", 4 * size, split, read_group)
    small.fill(5)
    assert sum(file.stat().st_size for file in files(tmp_path / "cache")) <= 4 * size


def test_two_jobs_with_other_data_share_a_small_folder(tmp_path: Path, split: ParquetSplit) -> None:
    write_parquet(tmp_path / "other set", "train.parquet", range(ROWS, 2 * ROWS), group=GROUP)
    other = open_split(str(tmp_path / "other set"), "train")
    assert isinstance(other, ParquetSplit)
    caches = [GroupCache(tmp_path / "cache", 40_000, one, read_group) for one in (split, other)]
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=rows_from, args=(cache, one, first)) for cache, one, first in
            zip(caches, (split, other), (0, ROWS), strict=True) for _ in range(2)]  # fmt: skip
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4
    assert 0 < sum(file.stat().st_size for file in files(tmp_path / "cache")) <= 40_000


def rows_from(cache: GroupCache, split: ParquetSplit, first: int) -> None:
    reader = ParquetReader(split, cache.table, memory_bytes=1)
    for i in range(ROWS):
        assert reader.rows([i])[0].data == png(first + i)


def test_kills_at_any_moment_leave_a_folder_that_works(tmp_path: Path, split: ParquetSplit) -> None:
    """Twenty processes are killed while they read, write and clear; whoever comes after them reads every row."""
    context = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    for _ in range(20):
        job = context.Process(target=all_rows, args=(GroupCache(tmp_path / "cache", 30_000, split, read_group), split))
        job.start()
        time.sleep(float(rng.uniform(0.0, 0.05)))
        job.kill()
        job.join()
    for left in files(tmp_path / "cache", "tmp"):  # as old as they would be for the next job
        os.utime(left, (0, 0))
    all_rows(GroupCache(tmp_path / "cache", 30_000, split, read_group), split)
    assert sum(file.stat().st_size for file in files(tmp_path / "cache")) <= 30_000


def test_a_folder_that_cannot_be_written_to_is_told_by_its_key(
    tmp_path: Path, split: ParquetSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = r"^Nothing can be kept in .*{} \({}\): set data.cache_dir to a folder that can be written to\.$"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=says.format("file", "Not a directory")):
        GroupCache(tmp_path / "file", 10**9, split, read_group)
    with pytest.raises(DataError, match=says.format("file/below", "Not a directory")):
        GroupCache(tmp_path / "file/below", 10**9, split, read_group)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "read-only")
    with pytest.raises(DataError, match=says.format("read-only", "Permission denied")):
        GroupCache(tmp_path / "read-only", 10**9, split, read_group)


def test_another_job_that_clears_the_folder_disturbs_no_reader(tmp_path: Path, split: ParquetSplit) -> None:
    cache = GroupCache(tmp_path / "cache", 10**9, split, read_group)
    held = cache.table(2)
    for file in files(tmp_path / "cache"):
        file.unlink()
    assert held.equals(read_group(split, 2))
    assert cache.table(2).equals(held)


def test_changed_files_are_not_mistaken_for_the_old_ones(tmp_path: Path, split: ParquetSplit) -> None:
    GroupCache(tmp_path / "cache", 10**9, split, read_group).fill(0)
    write_parquet(tmp_path / "set", "train.parquet", range(ROWS, 0, -1), group=GROUP)  # type: ignore[arg-type]
    changed = open_split(str(tmp_path / "set"), "train")
    assert isinstance(changed, ParquetSplit)
    reader = ParquetReader(changed, GroupCache(tmp_path / "cache", 10**9, changed, read_group).table)
    assert reader.rows([0])[0].data == png(ROWS)


def test_the_fetcher_keeps_ahead_but_not_too_far_and_goes_on_into_the_next_epoch(
    tmp_path: Path, split: ParquetSplit
) -> None:
    cache = GroupCache(tmp_path / "cache", 10**9, split, read_group)
    needs = NodeNeeds(split.rows, seed=0, global_batch=10, window=28, rank=0, ranks=1, world=1)
    ahead = FillAhead(cache, needs, epoch_steps=21, steps=4)
    try:
        for step in (0, 8):
            ahead.training_at(0, step)
            plan = EpochPlan(split.rows, seed=0, epoch=0, global_batch=10, window=28)
            groups, before = plan.groups_needed(0, 0, 1)
            due = set(groups[before <= step + 4].tolist())
            wait_for(lambda due=due: all(cache.has(group) for group in due))
            assert {group for group in range(GROUPS) if cache.has(group)} <= due
        ahead.training_at(0, 20)
        wait_for(lambda: len(files(tmp_path / "cache")) == GROUPS)
    finally:
        ahead.close()


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
