"""Memory for maps, used again from step to step.

The system clears each page that it hands out, and torch returns a large map's pages as soon as it is freed: a tenth of a
training step went there. Here maps lie side by side in one region that is kept. It is as large as the maps that were in
use at once, and the gaps between them.
"""

import ctypes
import functools
import mmap
import threading
from collections import deque

import torch
from torch import Tensor

LARGE = 1 << 20
"""Bytes from which on a map is lent; malloc keeps what is smaller."""
_GRAIN = 1 << 16


class Lender:
    """Lends memory as tensors, and has it back when the last tensor that uses it is freed. Any thread may ask."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._enough = 0  # bytes of one region that would have had room for all so far
        self._lock = threading.Lock()
        # A tensor may be freed at any time, while its thread holds the lock too: what comes back waits here.
        self._back: deque[tuple[_Region, int, int]] = deque()

    def floats(self, count: int) -> Tensor:
        """Uninitialised float32 (count,)."""
        if 4 * count < LARGE:
            return torch.empty(count)
        size = -(-4 * count // _GRAIN) * _GRAIN
        with self._lock:
            self._collect()
            region, start = self._take(size)
        loan = _loan(size).from_buffer(region.memory, start)
        vars(loan).update(back=self._back, place=(region, start, size))
        return torch.frombuffer(loan, dtype=torch.float32, count=count)

    @property
    def lent(self) -> int:
        """Bytes in use."""
        with self._lock:
            self._collect()
            return sum(region.lent for region in self._regions)

    @property
    def kept(self) -> int:
        """Bytes that wait for the next map."""
        return sum(region.size for region in self._regions) - self.lent

    def _collect(self) -> None:
        while self._back:
            region, start, size = self._back.popleft()
            region.give_back(start, size)

    def _take(self, size: int) -> tuple["_Region", int]:
        if len(self._regions) > 1 and not any(region.lent for region in self._regions):
            self._regions = [_Region(self._enough)]
        for region in self._regions:
            start = region.take(size)
            if start is not None:
                return region, start
        self._regions = [region for region in self._regions if region.lent]  # what is too small is no use beside it
        there = sum(region.size for region in self._regions) - (self._regions[-1].tail if self._regions else 0)
        self._enough = max(self._enough, there + size)
        region = _Region(size)
        self._regions.append(region)
        region.take(size)
        return region, 0


class _Region:
    """Memory of the system, and which of it is free."""

    def __init__(self, size: int) -> None:
        # Private: what a forked child writes must not reach its parent.
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # few large pages are cleared and entered faster than many small ones
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.size = size
        self.lent = 0
        self._free = [(0, size)]  # from, to: in order, none beside another

    def take(self, size: int) -> int | None:
        """Where the first gap of that size begins; None where there is none."""
        for i, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[i : i + 1] = [(start + size, end)] if end - start > size else []
                self.lent += size
                return start
        return None

    @property
    def tail(self) -> int:
        """Bytes that are free at the end."""
        return self._free[-1][1] - self._free[-1][0] if self._free and self._free[-1][1] == self.size else 0

    def give_back(self, start: int, size: int) -> None:
        self.lent -= size
        self._free = _joined(sorted([*self._free, (start, start + size)]))


def _joined(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined = gaps[:1]
    for start, end in gaps[1:]:
        if joined[-1][1] == start:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


@functools.cache
def _loan(size: int) -> type[ctypes.Array[ctypes.c_char]]:
    """What a tensor of `size` bytes holds on to, and frees with itself."""

    def end(self: ctypes.Array[ctypes.c_char]) -> None:
        self.back.append(self.place)  # type: ignore[attr-defined]

    return type("Loan", (ctypes.c_char * size,), {"__del__": end})


floats = Lender().floats
