"""The native CPU engine: attention over tiles in C++, called through ctypes, on PyTorch's own threads.

It is one shared library beside this file, built with the package where a compiler is there; no PyTorch header is in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from saccade.native.call import Array, Call, Choice, Linear, Part

ISA = ("portable", "AVX2", "AVX-512", "AVX-512 with BF16")
NAMES = ("libsaccade.so", "libsaccade.dylib", "saccade.dll")


@dataclass(frozen=True)
class Engine:
    """The loaded library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


@functools.cache
def engine() -> Engine:
    """The engine, loaded once."""
    found = next((p for n in NAMES if (p := Path(__file__).with_name(n)).exists()), None)
    if found is None:
        return Engine(None, "was not built: install saccade with a C++17 compiler at hand")
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        return Engine(None, f"does not load: {error}")
    for entry in (library.saccade_forward, library.saccade_backward):
        entry.argtypes, entry.restype = [ctypes.POINTER(Call)], ctypes.c_int
    for entry in (library.saccade_linear_forward, library.saccade_linear_backward):
        entry.argtypes, entry.restype = [ctypes.POINTER(Linear)], ctypes.c_int
    library.saccade_choose.argtypes = [ctypes.POINTER(Call), ctypes.POINTER(Choice)]
    library.saccade_choose.restype = ctypes.c_int
    return Engine(library)


def reason() -> str:
    """Why the engine cannot run here; empty when it can."""
    return engine().reason


def available() -> bool:
    """Whether the engine is here."""
    return not reason()


def isa() -> str:
    """The instruction set that the engine takes on this machine."""
    library = engine().library
    return "" if library is None else ISA[library.saccade_isa()]


@functools.cache
def pool() -> int:
    """The address of GOMP_parallel in the OpenMP that PyTorch has loaded; 0 where it has another: plain threads then serve."""
    if sys.platform != "linux":
        return 0
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value or 0
    return 0


@dataclass
class Counter:
    """FLOPs that the engine did."""

    flops: int = 0


_COUNTERS: list[Counter] = []


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Counts the FLOPs of matrix products, padding of tiles included, that the engine does inside the block."""
    counter = Counter()
    _COUNTERS.append(counter)
    try:
        yield counter
    finally:
        _COUNTERS.remove(counter)


def _ready(call: Call | Linear) -> ctypes.CDLL:
    library = engine().library
    if library is None:
        raise RuntimeError(f"the native engine {reason()}")
    call.threads, call.pool = torch.get_num_threads(), pool()
    return library


def _checked(failed: int) -> None:
    if failed:
        raise MemoryError("the native engine found no memory for its scratch")


def run(call: Call, backward: bool) -> None:
    """Fill in what the call's outputs point to, on as many threads as PyTorch uses."""
    library = _ready(call)
    _checked((library.saccade_backward if backward else library.saccade_forward)(ctypes.byref(call)))
    d, e = call.dim, call.value_dim
    for counter in _COUNTERS:
        counter.flops += 2 * call.computed * (3 * d + 2 * e if backward else d + e)


def choose(call: Call, choice: Choice) -> None:
    """Fill in the index and the valid flags of a choice."""
    _checked(_ready(call).saccade_choose(ctypes.byref(call), ctypes.byref(choice)))
    rows = call.batch * call.heads * call.rows
    for counter in _COUNTERS:
        counter.flops += 2 * rows * choice.blocks * call.dim


def run_linear(call: Linear, backward: bool) -> None:
    """Fill in what the call's outputs point to."""
    library = _ready(call)
    run = library.saccade_linear_backward if backward else library.saccade_linear_forward
    _checked(run(ctypes.byref(call)))
    _count(call)


def run_bound(call: Linear) -> None:
    """A forward pass of a call that knows its threads already."""
    library = engine().library
    assert library is not None
    _checked(library.saccade_linear_forward(ctypes.byref(call)))
    _count(call)


def _count(call: Linear) -> None:
    for counter in _COUNTERS:
        counter.flops += 2 * call.computed


__all__ = [
    "Array",
    "Call",
    "Choice",
    "Counter",
    "Linear",
    "Part",
    "available",
    "choose",
    "counting",
    "isa",
    "reason",
    "run",
    "run_bound",
    "run_linear",
]
