"""Cells as a worker runs them: real training and timing on tiny settings, and what happens when a job fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

import saccade as sc
from saccade.bench import cell, train
from saccade.bench.worker import Worker, ending
from saccade.tasks import text
from saccade.tasks.recall import Recall

QUALITY = {"tokens": 4096, "length": 64, "batch": 8, "dim": 16, "depth": 1, "heads": 1, "learning_rate": 5e-3}
RECALL = {"lengths": [24, 40], "steps": 12, "tokens": 512, "pairs": 4, "queries": 12, "keys": 8, "values": 8,
          "dim": 16, "depth": 1, "heads": 1, "learning_rate": 2e-3}  # fmt: skip
SPEED = {"batch": 1, "heads": 2, "head_dim": 16, "seconds": 0.02}


def job(kind: str, settings: dict[str, Any], mechanism: str = "causal", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "mechanism": mechanism, "text": mechanism, "device": "cpu", "threads": 1, "seed": 0,
            "settings": settings, **more}  # fmt: skip


def quality_job(**more: Any) -> dict[str, Any]:
    corpus = {"path": None, "sha256": text.load(window=64).sha256}
    return job("quality", QUALITY, **{"corpus": corpus, **more})


@pytest.fixture(scope="module")
def worker() -> Any:
    with Worker() as worker:
        yield worker


def only(result: dict[str, Any]) -> dict[str, Any]:
    (found,) = result["cells"].values()
    return found


def test_quality_learns_and_scores_the_heldout_text() -> None:
    result = cell.run(quality_job())
    assert list(result["cells"]) == ["quality/causal/0"]
    found = only(result)
    assert found["tokens"] == 4096
    assert found["curve"][-1][0] == 4096
    assert found["curve"][0][1] > found["curve"][-1][1] == found["train_bits_per_byte"]
    assert found["bits_per_byte"] < 8
    assert found["bits_per_byte"] == pytest.approx(
        sum(found["window_bits"]) / len(found["window_bits"]), abs=1e-3
    )
    assert found["baseline"] == pytest.approx(text.load(window=64).baseline(64))
    assert found["parameters"] > 256 * 16
    assert found["seconds"] > 0


def test_the_same_seed_gives_the_same_cell_and_another_seed_another() -> None:
    one, again, other = (only(cell.run(quality_job(seed=seed)))["bits_per_byte"] for seed in (0, 0, 1))
    assert one == again != other


def test_mechanisms_see_the_same_data_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[torch.Tensor]] = {}
    batch = text.Corpus.batch
    for name in ("causal", "window(4)"):
        seen = drawn.setdefault(name, [])

        def spy(self: text.Corpus, *args: Any, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(batch(self, *args))
            return seen[-1]

        monkeypatch.setattr(text.Corpus, "batch", spy)
        cell.run(quality_job(mechanism=name) | {"text": name})
    assert len(drawn["causal"]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*drawn.values(), strict=True))


def test_a_text_that_changes_meanwhile_is_noticed() -> None:
    result = cell.run(quality_job(corpus={"path": None, "sha256": "0"}))
    assert "changed while the comparison ran" in result["error"]


def test_recall_is_scored_at_every_length() -> None:
    cells = cell.run(job("recall", RECALL))["cells"]
    assert list(cells) == ["recall/causal/24/0", "recall/causal/40/0"]
    for length, found in zip((24, 40), cells.values(), strict=True):
        assert found["length"] == length
        assert found["chance"] == 0.25
        assert 0 <= found["accuracy"] <= 1
        assert found["questions"] == 2048 // 12 * 12
        assert found["reach"] == f"the answer lies at least {length - 8 - 12 + 1} tokens back"


def test_recall_is_learned_by_full_attention_and_not_by_what_cannot_see_the_pairs() -> None:
    settings = RECALL | {"lengths": [20, 48], "steps": 240, "tokens": 1920, "pairs": 2, "queries": 16, "keys": 4,
                         "values": 4, "dim": 32, "depth": 2, "learning_rate": 4e-3}  # fmt: skip
    full, near = (cell.run(job("recall", settings, m))["cells"] for m in ("causal", "window(8)"))
    assert [found["accuracy"] > 0.9 for found in full.values()] == [True, True]
    assert near["recall/window(8)/48/0"]["accuracy"] < 0.7


def test_training_goes_from_short_and_easy_to_all() -> None:
    tasks = [Recall(40, 8, 16), Recall(80, 8, 16)]
    plan = list(train.short_then_all(tasks, 30))
    assert len(plan) == 30
    assert {task for task, _ in plan[:20]} == {tasks[0]}
    assert {pairs for _, pairs in plan[:20]} == {2, 4, 8}
    assert {task for task, _ in plan[20:]} == set(tasks)
    assert {pairs for _, pairs in plan[20:]} == {8}


def test_the_learning_rate_rises_holds_and_falls() -> None:
    factor = train.warm_up_hold_decay(90)
    rates = [factor(step) for step in range(90)]
    assert rates[0] == pytest.approx(1 / 9)
    assert rates[9:60] == [1.0] * 51
    assert rates[60:] == sorted(rates[60:], reverse=True)
    assert 0.1 < rates[-1] < 0.2


@pytest.mark.parametrize("what", ["forward", "backward", "decode"])
@pytest.mark.parametrize(
    "name", ["causal", "window(16)", "moba(16, top=2)", "causal + performer_favor", "causal + linear"]
)
def test_speed_times_every_kind_of_call(what: str, name: str) -> None:
    found = only(cell.run(job("speed", SPEED, name, what=what, length=96, measure="time")))
    assert len(found["samples_ms"]) >= 2
    assert found["p10_ms"] <= found["median_ms"] <= found["p90_ms"]
    assert found["kernel"]


@pytest.mark.parametrize("name", ["gqa(2) + causal", "aaren", "luong_attention", "linformer(8, length=96)"])
def test_speed_gives_a_mechanism_what_its_parts_declare(name: str) -> None:
    if name not in ("gqa(2) + causal", "linformer(8, length=96)"):
        name = str(sc.causal(sc.mechanism(name)))
    found = only(cell.run(job("speed", SPEED, name, what="backward", length=96, measure="time")))
    assert found["median_ms"] > 0


def test_peak_memory_is_what_the_call_holds(worker: Worker) -> None:
    settings = SPEED | {"heads": 8, "head_dim": 64}
    peaks = {}
    for what in ("forward", "backward"):
        found = only(worker.run(job("speed", settings, what=what, length=4096, measure="memory")))
        peaks[what] = found["peak_bytes"]
    out = 8 * 4096 * 64 * 4
    assert out <= peaks["forward"] < 3 * out
    assert 4 * out <= peaks["backward"] < 8 * out


def test_an_error_is_told_in_its_own_words(worker: Worker) -> None:
    result = worker.run(
        job("speed", SPEED, "linformer(8, length=64)", what="forward", length=96, measure="time")
    )
    assert "64" in result["error"]
    assert "Traceback" not in result["error"]


def test_an_unforeseen_error_keeps_its_traceback(worker: Worker) -> None:
    result = worker.run(job("speed", {}, what="forward", length=8, measure="time"))
    assert result["error"].startswith("KeyError")
    assert "Traceback" in result["traceback"]


def test_a_worker_outlives_a_job_that_kills_its_process(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: dict[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    monkeypatch.setitem(cell.RUNNERS, "speed", die)
    if sys.platform == "linux":
        assert "signal 9" in cell._forked(job("speed", SPEED))
    assert only(worker.run(job("speed", SPEED, what="forward", length=32, measure="time")))["median_ms"] > 0


def test_a_worker_starts_again_after_its_process_died() -> None:
    with Worker() as worker:
        process = worker.start()
        process.kill()
        process.wait()
        assert (
            "signal 9" in worker.run(job("speed", SPEED, what="forward", length=32, measure="time"))["error"]
        )
        assert "cells" in worker.run(job("speed", SPEED, what="forward", length=32, measure="time"))


def test_stopping_ends_the_job_too() -> None:
    worker = Worker()
    process = worker.start()
    worker.stop()
    assert process.poll() is not None
    worker.stop()


def test_endings_in_words() -> None:
    assert ending(3) == "exit code 3"
    assert ending(-11) == "signal 11"
    assert "memory" in ending(-9)


def test_what_a_mechanism_prints_is_no_answer() -> None:
    code = (
        "import sys; from saccade.bench import cell\n"
        "cell.RUNNERS['speed'] = lambda job: print('noise') or {'a': {}}\n"
        "cell.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input='{"kind": "speed", "device": "cpu", "threads": 1}\n',
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith('{"cells": {"a": {"seconds": ')
    assert "noise" not in done.stdout
