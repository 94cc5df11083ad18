"""Cells in processes of their own, side by side, on one device or spread over all cards."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")


def card(device: str) -> str:
    """The device of this process: `cuda` is one card of all, in turn."""
    if device != "cuda":
        return device
    number = (multiprocessing.current_process()._identity or (1,))[0]
    return f"cuda:{(number - 1) % torch.cuda.device_count()}"


def each(do: Callable[[Job], Any], jobs: Sequence[Job], processes: int, end: float) -> Iterator[Any]:
    """The results of `do`, as they come, until all are there or the clock of `time.monotonic` passes `end`."""
    with multiprocessing.get_context("spawn").Pool(min(processes, max(1, len(jobs)))) as pool:
        found = pool.imap_unordered(do, jobs)
        for _ in jobs:
            try:
                yield found.next(max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                return


def synchronize(device: str) -> None:
    """Wait for what a card still does."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
