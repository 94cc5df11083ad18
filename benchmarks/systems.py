"""Runs the check of every working system, the long learning checks included; writes benchmarks/results/systems.json.

python benchmarks/systems.py [pytest arguments]

Arguments may choose some checks, such as -k hymba: these take the place of what the file held of them, the others stay.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import saccade as sc
from saccade.bench.machine import describe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "systems.json"


class Recorder:
    """Keeps the outcome and the seconds of every check, by system; marks are seen where tests are collected."""

    def __init__(self) -> None:
        self.refs: dict[str, list[str]] = {}
        self.checks: list[dict[str, Any]] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.refs[item.nodeid] = [mark.args[0] for mark in item.iter_markers("system")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome == "skipped":
            row = {"check": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            self.checks.append({"systems": self.refs.get(report.nodeid, []), **row})


def kept(renewed: set[str]) -> list[dict[str, Any]]:
    """The rows of the file for checks that were not run again."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["checks"] if RESULTS.exists() else []
    return [row for row in known if row["check"] not in renewed]


def main() -> int:
    recorder = Recorder()
    chosen = [str(ROOT / "tests" / "systems"), "-m", "system", *sys.argv[1:]]
    pytest.main([*chosen, "--collect-only", "--numprocesses=0", "-qq"], plugins=[recorder])
    code = pytest.main(chosen, plugins=[recorder])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    new = [{**row, "commit": commit.stdout.strip()} for row in recorder.checks]
    document = {
        "made_by": "python benchmarks/systems.py",
        "date": datetime.date.today().isoformat(),
        "saccade": sc.__version__,
        "machine": describe("cpu"),
        "checks": [*kept({row["check"] for row in new}), *new],
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {RESULTS}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
