"""A whole comparison on tiny settings: order, resuming, interruption, failures, and the documents it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saccade.bench import compare as bench
from saccade.bench import presets
from saccade.bench.compare import Progress
from saccade.bench.presets import Preset, Quality, RecallRun, Speed

TINY = Preset(
    "tiny",
    (0,),
    Quality(tokens=2048, length=64, batch=8, dim=16, depth=1, heads=1),
    RecallRun((24, 40), 6, 256, pairs=4, queries=12, keys=8, values=8, dim=16, depth=1, heads=1),
    Speed(lengths=(64, 128), seconds=0.01, heads=2, head_dim=16),
)
NAMES = ["causal", "causal + memory_efficient_attention", "window(16)", "linformer(8, length=128)"]


def prepared(
    folder: Path, mechanisms: list[str] | None = None, preset: Preset = TINY, **more: Any
) -> bench.Comparison:
    return bench.prepare(NAMES[2:] if mechanisms is None else mechanisms, preset, folder=folder, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Progress]]:
    folder, seen = tmp_path_factory.mktemp("compare"), []
    results = bench.compare(prepared(folder, command="saccade compare --tiny"), seen.append)
    return folder, results, seen


def by_kind(results: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {name: cell for name, cell in results["cells"].items() if cell["kind"] == kind}


def test_every_cell_is_there(finished: tuple[Path, dict[str, Any], list[Progress]]) -> None:
    _, results, _ = finished
    ids = {f"quality/{n}/0" for n in NAMES} | {f"recall/{n}/{length}/0" for n in NAMES for length in (24, 40)}
    ids |= {f"speed/{n}/{w}/{s}" for n in NAMES for w in ("forward", "backward", "decode") for s in (64, 128)}
    assert set(results["cells"]) == ids
    assert not results["interrupted"]


def test_cells_hold_what_was_measured(finished: tuple[Path, dict[str, Any], list[Progress]]) -> None:
    _, results, _ = finished
    for cell in by_kind(results, "quality").values():
        if cell["status"] == "ok":
            assert cell["bits_per_byte"] > 0
            assert cell["curve"]
    for cell in by_kind(results, "speed").values():
        if cell["status"] == "ok":
            assert cell["samples_ms"]
            assert cell["peak_bytes"] is not None


def test_a_mechanism_without_a_causal_form_is_timed_and_says_why_it_is_not_trained(
    finished: tuple[Path, dict[str, Any], list[Progress]],
) -> None:
    _, results, _ = finished
    name = NAMES[3]
    states = {cell_id: c["status"] for cell_id, c in results["cells"].items() if c["mechanism"] == name}
    assert states[f"quality/{name}/0"] == states[f"recall/{name}/24/0"] == "failed"
    assert states[f"speed/{name}/decode/64"] == "failed"
    assert states[f"speed/{name}/forward/64"] == states[f"speed/{name}/backward/128"] == "ok"
    assert "no causal form" in results["cells"][f"quality/{name}/0"]["error"]
    entry = next(e for e in results["summary"] if e["name"] == name)
    assert entry["status"] == "partial"
    assert entry["forward_ms"].keys() == {"64", "128"}


def test_files_say_the_same(finished: tuple[Path, dict[str, Any], list[Progress]]) -> None:
    folder, results, _ = finished
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    page = (folder / "report.html").read_text()
    assert "saccade compare --tiny" in page
    assert all(name in page for name in NAMES)
    assert len((folder / "cells.jsonl").read_text().splitlines()) == len(results["cells"])


def test_the_document_describes_the_run(finished: tuple[Path, dict[str, Any], list[Progress]]) -> None:
    _, results, _ = finished
    assert results["schema"] == 1
    assert results["settings"]["text"] == "pydoc_data.topics"
    assert results["settings"]["recall_lengths"] == [24, 40]
    assert results["settings"]["speed_shape"] == {"batch": 1, "heads": 2, "head_dim": 16}
    assert [m["role"] for m in results["mechanisms"]] == ["reference", "twin", "candidate", "candidate"]
    assert results["machine"]["device"] == "cpu"
    assert results["noise"]["bits_per_byte"] > 0
    assert results["caveats"]


def test_quality_comes_first_then_speed_then_recall(
    finished: tuple[Path, dict[str, Any], list[Progress]],
) -> None:
    _, results, seen = finished
    kinds = [cell["kind"] for cell in results["cells"].values()]
    assert kinds == sorted(kinds, key=["quality", "speed", "recall"].index)
    lengths = [c["length"] for c in by_kind(results, "speed").values()]
    assert lengths == sorted(lengths)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, seen[-1].total, 4 + 24 + 4)
    assert "causal: quality, seed 0" in seen[0].running
    assert seen[-1].seconds_left == 0


def test_the_same_call_measures_nothing_again(
    finished: tuple[Path, dict[str, Any], list[Progress]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results, _ = finished

    def never(*_: Any) -> Any:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr("saccade.bench.worker.Worker.run", never)
    again = bench.compare(prepared(folder), lambda p: None)
    assert again["cells"].keys() == results["cells"].keys()
    ok = [name for name, cell in results["cells"].items() if cell["status"] == "ok"]
    assert all(again["cells"][name] == results["cells"][name] for name in ok)


def keys(comparison: bench.Comparison) -> dict[str, str]:
    return {name: cell.key for cell in comparison.cells() for name in cell.ids}


def test_another_mechanism_leaves_the_finished_cells_known(tmp_path: Path) -> None:
    few, more = keys(prepared(tmp_path, ["moba"])), keys(prepared(tmp_path, ["moba", "window(16)"]))
    assert few.items() <= more.items()
    assert len(more) > len(few)


def test_other_settings_another_text_and_another_seed_are_other_cells(tmp_path: Path) -> None:
    base = keys(prepared(tmp_path))
    longer = keys(prepared(tmp_path, preset=replace(TINY, quality=replace(TINY.quality, tokens=4096))))
    (tmp_path / "text.txt").write_text("some other text " * 100)
    other = keys(prepared(tmp_path, text=tmp_path / "text.txt"))
    for changed in (longer, other):
        differ = {name for name in base if base[name] != changed[name]}
        assert differ == {name for name in base if name.startswith("quality/")}
    seeds = keys(prepared(tmp_path, preset=replace(TINY, seeds=(0, 1))))
    assert base.items() <= seeds.items()
    assert len(set(seeds.values())) == len({name.replace("/24/", "/").replace("/40/", "/") for name in seeds})


def test_ctrl_c_keeps_finished_cells_and_the_same_call_goes_on(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    stopped = bench.compare(prepared(tmp_path), interrupt)
    assert stopped["interrupted"]
    assert len(stopped["cells"]) >= 5
    assert "interrupted" in (tmp_path / "report.html").read_text()
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert on_disk["interrupted"]
    (tmp_path / "results.json").write_text('{"cells": {"quality')

    seen: list[Progress] = []
    whole = bench.compare(prepared(tmp_path), seen.append)
    assert seen[0].done >= 4
    assert any("moved to results.json.broken-1" in p.said for p in seen)
    assert not whole["interrupted"]
    assert len(whole["cells"]) == 4 + 24 + 8
    kept = {name: c for name, c in stopped["cells"].items() if c["status"] == "ok"}
    assert kept
    assert all(whole["cells"][name] == cell for name, cell in kept.items())


def test_fresh_starts_over(tmp_path: Path) -> None:
    bench.compare(prepared(tmp_path, []), stop_after(2))
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        stop_after(2)(progress)

    bench.compare(prepared(tmp_path, [], fresh=True), watch)
    assert seen[0].done == 0


def stop_after(cells: int) -> Any:
    def watch(progress: Progress) -> None:
        if progress.done >= cells:
            raise KeyboardInterrupt

    return watch


def test_a_failing_mechanism_leaves_the_rest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench.Worker.run

    def failing(self: bench.Worker, job: dict[str, Any]) -> dict[str, Any]:
        if job["mechanism"] == "window(16)":
            return {"error": "its process ended with signal 9, as when memory runs out"}
        return run(self, job)

    monkeypatch.setattr(bench.Worker, "run", failing)
    results = bench.compare(prepared(tmp_path, ["window(16)"]), lambda p: None)
    entries = {e["name"]: e for e in results["summary"]}
    assert entries["window(16)"]["status"] == "failed"
    assert "signal 9" in entries["window(16)"]["error"]
    assert entries["causal"]["status"] == "ok"
    assert "signal 9" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("lengths", [(0, 512), (-4,), ()])
def test_lengths_that_are_not_positive_are_refused(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="lengths must be positive"):
        bench.with_choices(TINY, lengths, None)


def test_lengths_are_sorted_and_taken_once() -> None:
    assert bench.with_choices(TINY, [512, 64, 512], None).speed.lengths == (64, 512)


def test_seeds_are_counted() -> None:
    assert bench.with_choices(TINY, None, 3).seeds == (0, 1, 2)
    assert bench.with_choices(TINY, None, None) == TINY
    with pytest.raises(ValueError, match="at least one seed"):
        bench.with_choices(TINY, None, 0)


def test_presets_ask_for_recall_beyond_two_layers_of_the_default_window() -> None:
    for preset in (presets.QUICK, presets.DEFAULT, presets.LONG):
        r = preset.recall
        assert len(r.lengths) >= 2
        assert max(r.lengths) - 2 * r.pairs - r.queries + 1 > r.depth * 127
        assert min(preset.speed.lengths) == 512
        assert max(preset.speed.lengths) == (4096 if preset is presets.QUICK else 8192)
    assert presets.LONG.quality.tokens == 20 * presets.DEFAULT.quality.tokens
    assert len(presets.LONG.seeds) == 3


def test_a_committed_long_run_is_read_without_its_own_long_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "compare_long.json").write_text('{"schema": 1, "long_run": null}')
    monkeypatch.setattr(bench.resources, "files", lambda _: tmp_path)
    assert bench.long_run() == {"schema": 1}
    (tmp_path / "data" / "compare_long.json").unlink()
    assert bench.long_run() is None
