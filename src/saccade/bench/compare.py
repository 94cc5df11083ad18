"""Runs a comparison: jobs in an order that fills the table early, each in a process of its own, kept as they finish."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import saccade as sc
from saccade.bench import contenders, machine, report, summary, train
from saccade.bench.advice import Judge
from saccade.bench.contenders import Contender
from saccade.bench.presets import Preset
from saccade.bench.store import Store
from saccade.bench.worker import Pool, Worker
from saccade.tasks import text as texts

REPORT = "report.html"
_LONG_RUN = "compare_long.json"
_MOST_LANES = 8
_PACE = 8e6  # tokens x depth x width that one core trains in a second, to guess how long is left


@dataclass(frozen=True)
class Cell:
    """One unit of work: what it measures of whom, the ids that it fills, and the jobs that a worker needs for it."""

    kind: str
    contender: Contender
    ids: Mapping[str, Mapping[str, Any]]
    jobs: tuple[dict[str, Any], ...]
    key: str
    label: str
    guess: float

    def blank(self, cell_id: str) -> dict[str, Any]:
        """The fields that say what a cell is about."""
        return {"kind": self.kind, "mechanism": self.contender.name, **self.ids[cell_id]}


@dataclass(frozen=True)
class Progress:
    """Where a comparison stands; `results` is the document so far, `said` a line for the user."""

    done: int
    total: int
    running: str
    seconds_left: float | None
    results: Mapping[str, Any]
    said: str = ""


Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Comparison:
    """All that is decided before work starts; making one with `prepare` checks every input."""

    preset: Preset
    contenders: tuple[Contender, ...]
    corpus: Mapping[str, Any]
    device: str
    machine: Mapping[str, Any]
    command: str
    folder: Path
    fresh: bool

    @property
    def lanes(self) -> int:
        """How many models are trained side by side; small ones gain little from more threads."""
        return min(self.machine["cores"], _MOST_LANES)

    def cells(self) -> Iterator[Cell]:
        """Quality of all, then speed by length, then recall."""
        p = self.preset
        for seed in p.seeds:
            for c in self.contenders:
                yield self._trained(
                    c, "quality", seed, {f"quality/{c.name}/{seed}": {"seed": seed}}, asdict(p.quality)
                )
        for length in p.speed.lengths:
            for what in summary.WHATS:
                for c in self.contenders:
                    yield self._speed(c, what, length)
        for seed in p.seeds:
            for c in self.contenders:
                ids = {f"recall/{c.name}/{n}/{seed}": {"length": n, "seed": seed} for n in p.recall.lengths}
                yield self._trained(c, "recall", seed, ids, asdict(p.recall))

    def _trained(
        self,
        c: Contender,
        kind: str,
        seed: int,
        ids: Mapping[str, Mapping[str, Any]],
        settings: dict[str, Any],
    ) -> Cell:
        job = self._job(c, kind, 1) | {"seed": seed, "settings": settings}
        if kind == "quality":
            job["corpus"] = dict(self.corpus)
        tokens = settings["tokens"] * settings.get("steps", 1)
        guess = 1 + tokens * settings["depth"] * settings["dim"] / _PACE
        return Cell(kind, c, ids, (job,), self._key(job), f"{c.name}: {kind}, seed {seed}", guess)

    def _speed(self, c: Contender, what: str, length: int) -> Cell:
        settings = {k: v for k, v in asdict(self.preset.speed).items() if k != "lengths"}
        job = self._job(c, "speed", self.machine["cores"])
        job |= {"what": what, "length": length, "settings": settings}
        ids = {f"speed/{c.name}/{what}/{length}": {"what": what, "length": length}}
        jobs = tuple(job | {"measure": measure} for measure in ("time", "memory"))
        guess = 0.3 + settings["seconds"] * (1 + length / 8192)
        return Cell("speed", c, ids, jobs, self._key(job), f"{c.name}: {what} at {length:,}", guess)

    def _job(self, c: Contender, kind: str, threads: int) -> dict[str, Any]:
        job = {"kind": kind, "mechanism": c.name, "text": str(c.measured), "device": self.device}
        return job | {"threads": threads}

    def _key(self, job: Mapping[str, Any]) -> str:
        """Stands for all that a cell depends on, so that a finished one is known again."""
        about = {k: v for k, v in job.items() if k not in ("mechanism", "corpus")}
        about["text_sha256"] = self.corpus["sha256"] if job["kind"] == "quality" else None
        about["machine"] = [self.machine["name"], self.machine["torch"], sc.__version__]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def document(self) -> dict[str, Any]:
        """`results.json` before any cell is known."""
        p = self.preset
        settings = {
            "preset": p.name,
            "seeds": list(p.seeds),
            **{k: v for k, v in asdict(p.quality).items() if k != "length"},
            "train_length": p.quality.length,
            "short_convolution": train.NEARBY + 1,
            "text": self.corpus["name"],
            "text_sha256": self.corpus["sha256"],
            "recall_lengths": list(p.recall.lengths),
            "recall": {k: v for k, v in asdict(p.recall).items() if k != "lengths"},
            "speed_lengths": list(p.speed.lengths),
            "speed_shape": {"batch": p.speed.batch, "heads": p.speed.heads, "head_dim": p.speed.head_dim},
        }
        return {
            "schema": report.SCHEMA,
            "saccade": sc.__version__,
            "command": self.command,
            "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "seconds": 0.0,
            "interrupted": False,
            "machine": dict(self.machine),
            "settings": settings,
            "mechanisms": [contenders.describe(c, p.speed, self.device) for c in self.contenders],
            "cells": {},
            "long_run": long_run(),
        }


def prepare(
    mechanisms: Sequence[str],
    preset: Preset,
    *,
    folder: Path,
    text: Path | None = None,
    device: str = "cpu",
    command: str = "saccade compare",
    fresh: bool = False,
) -> Comparison:
    """Check every input before any work starts.

    Raises ValueError for a mechanism, length, seed, device or text that cannot be used, OSError for a file that
    cannot be read.
    """
    _require_positive("lengths", preset.speed.lengths)
    if not preset.seeds:
        raise ValueError("at least one seed is needed: give --seeds 1 or more")
    machine.require(device)
    corpus = texts.load(text, window=preset.quality.length)
    return Comparison(
        preset,
        tuple(contenders.gather(mechanisms, preset.speed)),
        {"path": str(text) if text else None, "name": corpus.name, "sha256": corpus.sha256},
        device,
        machine.describe(device),
        command,
        folder,
        fresh,
    )


def with_choices(preset: Preset, lengths: Sequence[int] | None, seeds: int | None) -> Preset:
    """The preset with other speed lengths (sorted, each once) or another number of seeds.

    Raises ValueError for lengths that are not positive or for fewer than one seed.
    """
    if lengths is not None:
        _require_positive("lengths", lengths)
        preset = replace(preset, speed=replace(preset.speed, lengths=tuple(sorted(set(lengths)))))
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"at least one seed is needed, got {seeds}")
        preset = replace(preset, seeds=tuple(range(seeds)))
    return preset


def compare(comparison: Comparison, watch: Watch) -> dict[str, Any]:
    """Run what is not yet known, keep each cell as it finishes, write the report; returns the results document.

    A KeyboardInterrupt ends the run with what is finished: `interrupted` is True and the same call goes on from
    there. Raises OSError where the folder cannot be written.
    """
    said: list[str] = []
    store = Store(comparison.folder, said.append)
    if not comparison.fresh:
        store.read()
    run = _Run(comparison, store, watch)
    for line in said:
        run.tell(said=line)
    try:
        run.work()
    except KeyboardInterrupt:
        run.results["interrupted"] = True
    run.save()
    report.write(run.results, comparison.folder / REPORT)
    return run.results


class _Run:
    """The state of a comparison at work."""

    def __init__(self, comparison: Comparison, store: Store, watch: Watch) -> None:
        self.comparison = comparison
        self.store = store
        self.watch = watch
        self.results = comparison.document()
        self.cells = list(comparison.cells())
        self.waiting = [cell for cell in self.cells if not self._recover(cell)]
        self.guessed = self.spent = self.before = 0.0
        self.before = sum(cell.get("seconds") or 0.0 for cell in self.results["cells"].values())
        self.started = time.monotonic()

    def work(self) -> None:
        """Run every waiting cell: training side by side, measurements of speed alone."""
        lanes = {"speed": 1, "quality": self.comparison.lanes, "recall": self.comparison.lanes}
        with Pool(self.comparison.lanes) as pool:
            for kind, group in groupby(list(self.waiting), key=lambda cell: cell.kind):
                self.tell(lanes[kind])
                for cell, (measured, seconds) in pool.run(group, _measure, lanes[kind]):
                    self._keep(cell, measured)
                    self.guessed += cell.guess / lanes[kind]
                    self.spent += seconds / lanes[kind]
                    self.waiting.remove(cell)
                    self.save()
                    self.tell(lanes[kind])

    def tell(self, lanes: int = 0, said: str = "") -> None:
        """Report to whoever watches; `lanes` cells are running."""
        left = sum(
            cell.guess / (1 if cell.kind == "speed" else self.comparison.lanes) for cell in self.waiting
        )
        pace = self.spent / self.guessed if self.guessed else 1.0
        running = "; ".join(cell.label for cell in self.waiting[:lanes])
        done = len(self.cells) - len(self.waiting)
        self.watch(Progress(done, len(self.cells), running, left * pace, self.results, said))

    def save(self) -> None:
        """Summarise what is known and write it."""
        self.results["seconds"] = round(self.before + time.monotonic() - self.started, 1)
        self.results.update(conclude(self.results))
        self.store.write(self.results)

    def _recover(self, cell: Cell) -> bool:
        known = {cell_id: self.store.find(f"{cell.key}/{n}") for n, cell_id in enumerate(cell.ids)}
        if not all(known.values()):
            return False
        for cell_id, found in known.items():
            self.results["cells"][cell_id] = {**(found or {}), **cell.blank(cell_id)}
        return True

    def _keep(self, cell: Cell, measured: Mapping[str, Any]) -> None:
        for n, cell_id in enumerate(cell.ids):
            if "error" in measured:
                outcome = {"status": "failed", **measured}
            else:
                outcome = {"status": "ok", **measured["cells"][cell_id]}
            kept = {**cell.blank(cell_id), **outcome, "key": f"{cell.key}/{n}"}
            self.results["cells"][cell_id] = kept
            self.store.add(kept)


def _measure(cell: Cell, worker: Worker) -> tuple[dict[str, Any], float]:
    """The cells of all its jobs joined, or the first error; and the seconds that it took."""
    start = time.monotonic()
    if cell.contender.trained is None and (cell.kind != "speed" or cell.jobs[0]["what"] == "decode"):
        return {"error": cell.contender.reason}, 0.0
    joined: dict[str, dict[str, Any]] = {}
    for job in cell.jobs:
        result = worker.run(job)
        if "error" in result:
            return result, time.monotonic() - start
        for cell_id, values in result["cells"].items():
            known = joined.setdefault(cell_id, {"seconds": 0.0})
            joined[cell_id] = {**known, **values, "seconds": round(known["seconds"] + values["seconds"], 3)}
    return {"cells": joined}, time.monotonic() - start


def conclude(results: Mapping[str, Any]) -> dict[str, Any]:
    """Noise, summary, advice and caveats of a results document."""
    roles = {m["name"]: m["role"] for m in results["mechanisms"]}
    by_role = {
        role: [n for n, r in roles.items() if r == role] for role in ("reference", "twin", "candidate")
    }
    reference, twin = by_role["reference"][0], next(iter(by_role["twin"]), None)
    table = summary.Table(results["cells"])
    noise = summary.noise(table, reference, twin, by_role["candidate"])
    entries = summary.summarise(table, list(roles), reference, noise)
    judge = Judge(entries, roles, noise)
    return {
        "noise": noise,
        "summary": [{**entry, "verdict": judge.verdict(entry)} for entry in entries],
        "advice": judge.advice(),
        "caveats": judge.caveats(results["settings"]),
    }


def long_run() -> dict[str, Any] | None:
    """The committed long run, where the package holds one."""
    file = resources.files("saccade.bench") / "data" / _LONG_RUN
    if not file.is_file():
        return None
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {key: value for key, value in document.items() if key != "long_run"}


def _require_positive(what: str, values: Sequence[int]) -> None:
    if not values or min(values) < 1:
        raise ValueError(
            f"{what} must be positive whole numbers, got {', '.join(map(str, values)) or 'none'}"
        )
