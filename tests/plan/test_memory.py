"""Peak memory as planned against what a subprocess really takes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = [
    "causal",
    "window(256)",
    "gqa(2) + window(256)",
    "dilated(64, step=4)",
    "na(7, border=drop)",
    "alibi + causal",
    "memory_efficient_attention",
    "moba",
    "causal + additive(8)",
    "causal + relu",
    "causal + row_standard",
    "uniform",
    "causal + uniform",
    "linformer(rank=64, length=4096)",
    "causal + linear",
    "causal + performer_favor(64)",
]
LENGTHS = (1024, 4096)


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """All cases, measured one after the other in one fresh process."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory can be watched on Linux alone")
    jobs = [
        {"text": text, "length": length, "grad": grad}
        for text, length, grad in itertools.product(CASES, LENGTHS, (False, True))
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("peaks.py"))],
        input=json.dumps(jobs),
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("text", CASES)
def test_the_planned_peak_is_within_a_quarter_of_the_measured(
    found: list[dict[str, Any]], text: str, length: int, grad: bool
) -> None:
    (case,) = [c for c in found if (c["text"], c["length"], c["grad"]) == (text, length, grad)]
    ratio = case["predicted"] / case["measured"]
    assert 0.75 <= ratio <= 1.25, (
        f"planned {case['predicted']:,}, measured {case['measured']:,} ({ratio:.2f})"
    )
