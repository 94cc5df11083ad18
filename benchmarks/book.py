"""Results that grow cell by cell, and the section of a page that quotes them."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"

Row = dict[str, Any]


class Book:
    """Rows of several kinds in a JSON file: read where a call with the same settings left them, written after every row.

    `keys` names, for each kind, the fields that say which cell a row is of.
    """

    def __init__(self, path: Path, made_by: str, settings: Row, keys: dict[str, tuple[str, ...]]) -> None:
        self.path, self.made_by, self.keys = path, made_by, keys
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = known.get("settings") == json.loads(json.dumps(settings))
        self.document: Row = known if same else {"settings": settings} | {kind: [] for kind in keys}

    def has(self, kind: str, **cell: object) -> bool:
        """Whether a row of a cell is known that did not fail."""
        rows = (r for r in self.document[kind] if all(r[k] == v for k, v in cell.items()))
        return any("error" not in r for r in rows)

    def add(self, kind: str, row: Row, machine: Row) -> None:
        """Keep a row in place of an older one of the same cell, and write the file."""
        same = self.keys[kind]
        kept = [r for r in self.document[kind] if any(r[k] != row[k] for k in same)]
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        head = {
            "made_by": self.made_by,
            "date": datetime.date.today().isoformat(),
            "commit": commit.stdout.strip(),
            "machine": machine,
        }
        self.document = head | {k: v for k, v in self.document.items() if k not in head}
        self.document[kind] = [*kept, row]
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, self.path)


def put_section(page: Path, heading: str, text: str, before: str = "") -> None:
    """Write a section of a page anew; where there is none, put it before another heading, or at the end."""
    pieces = [f"\n## {piece}" for piece in page.read_text(encoding="utf-8").split("\n## ")]
    pieces[0] = pieces[0].removeprefix("\n## ")
    names = [piece.removeprefix("\n## ").partition("\n")[0] for piece in pieces]
    fresh = f"\n## {heading}\n\n{text.strip()}\n"
    if heading in names:
        pieces[names.index(heading)] = fresh
    else:
        pieces.insert(names.index(before) if before in names else len(pieces), fresh)
    page.write_text("".join(pieces), encoding="utf-8")
