"""Results on disk: nothing finished is lost, whatever happened to the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saccade.bench.store import CELLS, RESULTS, Store


def cell(key: str, **more: Any) -> dict[str, Any]:
    return {"key": key, "kind": "speed", "status": "ok", **more}


def opened(folder: Path, said: list[str] | None = None) -> Store:
    store = Store(folder, (said if said is not None else []).append)
    store.read()
    return store


def test_a_cell_is_found_again_by_its_key(tmp_path: Path) -> None:
    opened(tmp_path / "new" / "folder").add(cell("a/0", median_ms=3.5))
    again = opened(tmp_path / "new" / "folder")
    assert again.find("a/0") == cell("a/0", median_ms=3.5)
    assert again.find("b/0") is None


def test_the_latest_of_two_cells_counts(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(cell("a/0", median_ms=1.0))
    store.add(cell("a/0", median_ms=2.0))
    assert (opened(tmp_path).find("a/0") or {})["median_ms"] == 2.0


def test_failed_cells_are_tried_again(tmp_path: Path) -> None:
    opened(tmp_path).add(cell("a/0") | {"status": "failed", "error": "out of memory"})
    assert opened(tmp_path).find("a/0") is None


def test_a_line_torn_by_a_crash_loses_only_itself(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(cell("a/0"))
    store.add(cell("b/0"))
    whole = (tmp_path / CELLS).read_text()
    (tmp_path / CELLS).write_text(whole[:-9])
    said: list[str] = []
    again = opened(tmp_path, said)
    assert again.find("a/0")
    assert again.find("b/0") is None
    assert "1 unreadable line passed over, 1 cells kept" in said[0]
    again.add(cell("c/0"))
    third = opened(tmp_path)
    assert third.find("a/0")
    assert third.find("c/0")


def test_corrupted_results_are_moved_aside_and_cells_recovered(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(cell("a/0"))
    for number, broken in enumerate(('{"cells": {"x"', "[]", "\0\0\0"), start=1):
        (tmp_path / RESULTS).write_text(broken)
        said: list[str] = []
        assert opened(tmp_path, said).find("a/0")
        assert not (tmp_path / RESULTS).exists()
        assert (tmp_path / f"{RESULTS}.broken-{number}").read_text() == broken
        assert said == [
            f"{tmp_path / RESULTS} could not be read and was moved to {RESULTS}.broken-{number}; "
            f"finished cells come from {CELLS}"
        ]


def test_cells_are_recovered_from_results_alone(tmp_path: Path) -> None:
    opened(tmp_path).write({"cells": {"speed/x": cell("a/0")}})
    assert not (tmp_path / CELLS).exists()
    assert opened(tmp_path).find("a/0")


def test_a_failed_write_keeps_the_old_results(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write({"cells": {}, "n": 1})
    with pytest.raises(TypeError):
        store.write({"cells": {}, "n": object()})
    assert json.loads((tmp_path / RESULTS).read_text())["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [RESULTS]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"results cannot be written to .*file/out"):
        opened(tmp_path / "file" / "out")
    with pytest.raises(OSError, match="results cannot be written"):
        opened(tmp_path / "file")
    (tmp_path / "taken" / RESULTS).mkdir(parents=True)
    with pytest.raises(OSError, match=r"results\.json is a folder"):
        opened(tmp_path / "taken")
