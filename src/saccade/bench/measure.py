"""How a time and a peak of memory are measured."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
_BLOCK = 65536


def times_ms(
    call: Callable[[], object], device: str, *, budget_s: float, least: int = 5, most: int = 50
) -> list[float]:
    """Milliseconds of repeated calls after warm-up, each with the device synchronised before and after.

    Stops at `most` calls, or at `budget_s` once there are `least`. A call that takes the whole budget by itself
    is timed twice, the first time included: warming up has little left to save there.
    """
    first = _time_ms(call, device)
    if first >= 1000 * budget_s:
        return [first, _time_ms(call, device)]
    _time_ms(call, device)
    samples: list[float] = []
    end = time.perf_counter() + budget_s
    while len(samples) < most and (len(samples) < least or time.perf_counter() < end):
        samples.append(_time_ms(call, device))
    return samples


def spread(samples: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    low, middle, high = np.percentile(samples, [10, 50, 90])
    return {"median_ms": float(middle), "p10_ms": float(low), "p90_ms": float(high)}


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """The most memory that one call holds beyond what was held before it; None where that cannot be seen.

    On a GPU this is what PyTorch allocated. On a CPU it is resident memory, so measure in a fresh process, after
    a warm-up on a small input: what an earlier call left in the allocator would hide what this one needs.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_freed_blocks()
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    before = _max_resident()
    call()
    return (_max_resident() - before) or None


def _time_ms(call: Callable[[], object], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _return_freed_blocks() -> None:
    """Ask glibc to hand every block above 64 KiB back to the system when it is freed, and what is free now."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _BLOCK)
        libc.malloc_trim(0)


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _max_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
