"""The machine that a measurement was made on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")


def describe(device: str) -> dict[str, Any]:
    """Name, cores, memory and versions, as `results.json` keeps them; memory is that of the device."""
    return {
        "device": device,
        "name": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "cores": cores(),
        "memory_gib": round(_memory(device) / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require(device: str) -> None:
    """Raise ValueError unless `device` is a device of this machine that can be measured."""
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if count and (not index or (index.isdigit() and int(index) < count)):
        return
    have = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
    raise ValueError(f"device {device!r} was given and this machine has {have}")


def _cpu_name() -> str:
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
