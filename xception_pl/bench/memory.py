"""How much memory is held, and how much more a step needs."""

import ctypes
import gc
import sys
from collections.abc import Callable

import torch


def held(device: torch.device) -> int | None:
    """Bytes that lie in memory now; None where the system does not tell.

    On a GPU torch's allocator counts. On a CPU Linux does, for the whole process, after the heap gave back what is free.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return _resident("VmRSS")


def step_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes of a step above what is held before it; None where the system does not tell."""
    before = held(device)
    if before is None:
        return None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins again at what is resident now
    except OSError:
        return None
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
