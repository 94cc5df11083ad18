"""Runs each job in a process of its own, and survives whatever happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any


class Worker:
    """Hands jobs to `python -m saccade.bench.cell` and reads their results; use it in a `with` statement.

    On Linux one such process stays, imports PyTorch once, and forks for every job on the CPU. Elsewhere, and on a
    GPU, it ends after each job and the next job starts another.
    """

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._errors.close()

    def start(self) -> subprocess.Popen[str]:
        """Start the process now, so that it imports while the caller does something else."""
        self._errors.seek(0)
        self._errors.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "saccade.bench.cell"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # a Ctrl-C is for the caller, who then stops this process
        )
        return self._process

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The result of a job: {"cells": {id: cell}}, or {"error": why}."""
        process = self._process or self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": self._died()}
        result: dict[str, Any] = json.loads(line)
        if result.pop("last", False):
            process.wait()
            self._process = None
        return result

    def stop(self) -> None:
        """End the process and the job that it runs."""
        if self._process is None:
            return
        if hasattr(os, "killpg"):
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()
        self._process = None

    def _died(self) -> str:
        assert self._process
        code = self._process.wait()
        self._process = None
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with {ending(code)}" + (f": {said[-1]}" if said else "")


def ending(code: int) -> str:
    """How a process ended, in words; negative codes are signals."""
    if code == -signal.SIGKILL:
        return "signal 9, as when memory runs out"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
