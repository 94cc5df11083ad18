"""Where finished cells are kept, so that nothing finished is lost."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = "results.json"
CELLS = "cells.jsonl"

Say = Callable[[str], None]


class Store:
    """The folder of one comparison: `results.json`, and `cells.jsonl` with a line for each cell as it finishes.

    A cell is known again by its key, which stands for all that it depends on. Raises OSError where the folder
    cannot be written.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self.results = folder / RESULTS
        self.log = folder / CELLS
        self._say = say
        self._known: dict[str, dict[str, Any]] = {}
        _require_writable(folder)

    def read(self) -> None:
        """Learn the finished cells of earlier runs; files that cannot be read are moved aside or passed over."""
        for cell in (*self._from_log(), *self._from_results()):
            if isinstance(cell, dict) and cell.get("status") == "ok" and isinstance(cell.get("key"), str):
                self._known[cell["key"]] = cell

    def find(self, key: str) -> dict[str, Any] | None:
        """The finished cell of this key."""
        return self._known.get(key)

    def add(self, cell: Mapping[str, Any]) -> None:
        """Keep a finished cell on disk at once."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write(self, results: Mapping[str, Any]) -> Path:
        """Replace `results.json` whole: a reader sees the old file or the new one."""
        text = json.dumps(results, indent=1)
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".results-", suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, self.results)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return self.results

    def _from_log(self) -> list[Any]:
        if not self.log.exists():
            return []
        cells, torn = [], 0
        raw = self.log.read_bytes()
        for line in raw.splitlines():
            try:
                cells.append(json.loads(line))
            except ValueError:
                torn += 1
        if torn:
            self._say(
                f"{self.log}: {torn} unreadable line{'s' * (torn > 1)} passed over, {len(cells)} cells kept"
            )
        if raw and not raw.endswith(b"\n"):
            with self.log.open("a", encoding="utf-8") as file:
                file.write("\n")
        return cells

    def _from_results(self) -> list[Any]:
        if not self.results.exists():
            return []
        try:
            return list(json.loads(self.results.read_bytes())["cells"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            aside = _unused(self.results)
            os.replace(self.results, aside)
            self._say(
                f"{self.results} could not be read and was moved to {aside.name}; finished cells come from {CELLS}"
            )
            return []


def _unused(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    return aside


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, CELLS):
            if (folder / name).is_dir():
                raise IsADirectoryError(f"{folder / name} is a folder")
            if (folder / name).exists() and not os.access(folder / name, os.W_OK):
                raise PermissionError(f"{folder / name} may not be written")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"results cannot be written to {folder}: {error.strerror or error}") from error
