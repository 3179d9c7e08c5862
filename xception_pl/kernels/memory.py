"""Memory for maps, used again from step to step.

The system clears each page that it hands out, and torch returns a large map's pages as soon as it is freed: a tenth of a
training step went there. Here freed memory is kept for the next map of its size, and no more in all than was in use at
once.
"""

import ctypes
import functools
import mmap

import torch
from torch import Tensor

PAGE = 1 << 21
"""Bytes of a large page: few of them are cleared and entered faster than many small ones."""


class Lender:
    """Lends memory as tensors, and has it back when the last tensor that uses it is freed."""

    def __init__(self) -> None:
        self.lent = self.kept = self.most = 0  # bytes: in use, kept for later, and most that were in use at once
        self._free: dict[int, list[mmap.mmap]] = {}

    def floats(self, count: int) -> Tensor:
        """Uninitialised float32 (count,)."""
        if 8 * count < PAGE:
            return torch.empty(count)  # malloc keeps what is small
        size = -(-4 * count // PAGE) * PAGE
        try:
            memory = self._free[size].pop()
            self.kept -= size
        except (KeyError, IndexError):
            memory = self._new(size)
        self.lent += size
        self.most = max(self.most, self.lent)
        loan = _loan(size).from_buffer(memory)
        vars(loan).update(lender=self, memory=memory)
        return torch.frombuffer(loan, dtype=torch.float32, count=count)

    def _new(self, size: int) -> mmap.mmap:
        for free in list(self._free.values()):
            while free and self.lent + self.kept + size > max(self.most, self.lent + size):
                self.kept -= len(free.pop())
        # Private: what a forked child writes must not reach its parent.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _back(self, memory: mmap.mmap) -> None:
        self._free.setdefault(len(memory), []).append(memory)
        self.lent -= len(memory)
        self.kept += len(memory)


@functools.cache
def _loan(size: int) -> type[ctypes.Array[ctypes.c_char]]:
    """What a tensor of `size` bytes holds on to, and frees with itself."""

    def end(self: ctypes.Array[ctypes.c_char]) -> None:
        self.lender._back(self.memory)  # type: ignore[attr-defined]

    return type("Loan", (ctypes.c_char * size,), {"__del__": end})


floats = Lender().floats
