"""Runs each job in a process of its own, one at a time or side by side, and survives whatever happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Worker:
    """Hands jobs to `python -m saccade.bench.cell` and reads their results; use it in a `with` statement.

    On Linux one such process stays, imports PyTorch once, and forks for every job. Elsewhere it ends after each job
    and the next job starts another.
    """

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop for good."""
        self._closed = True
        self.stop()

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
        if self._closed:
            return {"error": "stopped"}
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
            return {"error": self._died(process)}
        result: dict[str, Any] = json.loads(line)
        if result.pop("last", False):
            process.wait()
            self._process = None
        return result

    def stop(self) -> None:
        """End the process and the job that it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()

    def _died(self, process: subprocess.Popen[str]) -> str:
        self._process = None
        code = process.wait()
        if self._closed:
            return "stopped"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with {ending(code)}" + (f": {said[-1]}" if said else "")


class Pool:
    """Workers side by side; use it in a `with` statement, which ends what still runs."""

    def __init__(self, lanes: int) -> None:
        self._workers = [Worker() for _ in range(lanes)]
        self._threads: list[ThreadPoolExecutor] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        for threads in self._threads:
            threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def run(
        self, tasks: Iterable[Task], do: Callable[[Task, Worker], Result], lanes: int
    ) -> Iterator[tuple[Task, Result]]:
        """Do all tasks on `lanes` workers, begun in order; yields each with its result as it ends."""
        free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers[:lanes]:
            free.put(worker)

        def one(task: Task) -> Result:
            worker = free.get()
            try:
                return do(task, worker)
            finally:
                free.put(worker)

        threads = ThreadPoolExecutor(lanes)
        self._threads.append(threads)
        begun = {threads.submit(one, task): task for task in tasks}
        for future in as_completed(begun):
            yield begun[future], future.result()


def ending(code: int) -> str:
    """How a process ended, in words; negative codes are signals."""
    if code == -signal.SIGKILL:
        return "signal 9, as when memory runs out"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
