"""The timing primitive and the peak of memory, against calls whose cost is known."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from saccade.bench import machine, measure

PEAK = """
import json, sys, torch
from saccade.bench import measure
held = torch.ones(8_000_000)
def call():
    made = torch.ones(int(sys.argv[1]))
    return made + 1
measure.peak_bytes(lambda: torch.ones(100) + 1, "cpu")
print(json.dumps([measure.peak_bytes(call, "cpu") for _ in range(2)]))
"""


def test_times_are_those_of_the_call() -> None:
    samples = measure.times_ms(lambda: time.sleep(0.01), "cpu", budget_s=0.1)
    assert 5 <= len(samples) <= 10
    assert all(s >= 10 for s in samples)


def test_warm_up_is_not_among_the_samples() -> None:
    pauses = iter([0.08, *[0.001] * 100])
    samples = measure.times_ms(lambda: time.sleep(next(pauses)), "cpu", budget_s=0.1)
    assert max(samples) < 60


def test_a_long_call_is_timed_twice() -> None:
    calls = []
    samples = measure.times_ms(lambda: (calls.append(1), time.sleep(0.02)), "cpu", budget_s=0.01)
    assert len(samples) == len(calls) == 2


def test_a_short_call_stops_at_the_most_samples() -> None:
    assert len(measure.times_ms(lambda: None, "cpu", budget_s=5, most=7)) == 7


def test_spread_is_median_and_percentiles() -> None:
    found = measure.spread([float(n) for n in range(11)])
    assert found == {"median_ms": 5.0, "p10_ms": 1.0, "p90_ms": 9.0}


@pytest.mark.parametrize("numbers", [4_000_000, 20_000_000])
def test_peak_counts_what_a_call_holds_and_nothing_from_before(numbers: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(numbers)], capture_output=True, text=True, check=True
    )
    for peak in json.loads(done.stdout):
        assert peak == pytest.approx(2 * 4 * numbers, rel=0.1)


def test_the_machine_is_described() -> None:
    found = machine.describe("cpu")
    assert found["device"] == "cpu"
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0.1
    assert found["name"]
    assert found["torch"].split(".")[0].isdigit()


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:99", "cuda:x", ""])
def test_devices_that_are_not_there_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="this machine has cpu"):
        machine.require(device)
