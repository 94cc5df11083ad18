"""A results document, read so that what is unknown is absent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Run:
    """One results document, read so that what is unknown is absent."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.mechanisms: list[Mapping[str, Any]] = list(results["mechanisms"])
        self.names: list[str] = [m["name"] for m in self.mechanisms]
        self.reference = next((m["name"] for m in self.mechanisms if m.get("role") == "reference"), None)
        self._summary: dict[str, Mapping[str, Any]] = {
            entry["name"]: entry for entry in results.get("summary") or []
        }
        self._cells = list((results.get("cells") or {}).values())

    def summary(self, name: str | None) -> Mapping[str, Any]:
        return self._summary.get(name or "", {})

    def number(self, name: str | None, key: str) -> float | None:
        return number(self.summary(name).get(key))

    def noise(self, key: str) -> float | None:
        return number((self.results.get("noise") or {}).get(key))

    def cells(self, kind: str, **wanted: object) -> list[Mapping[str, Any]]:
        """Finished cells of one kind whose fields equal those wanted."""
        done = (c for c in self._cells if c.get("kind") == kind and c.get("status") == "ok")
        return [c for c in done if all(c.get(key) == value for key, value in wanted.items())]

    def errors(self, name: str) -> list[str]:
        known = [self.summary(name).get("error")]
        known += [cell.get("error") for cell in self._cells if cell.get("mechanism") == name]
        return [error for error in known if error]

    def failure(self, name: str) -> str | None:
        """Why a mechanism has no numbers at all; None where it has some or none is due yet."""
        entry, errors = self.summary(name), self.errors(name)
        if entry.get("status") == "failed" or (not entry and errors):
            return errors[0] if errors else "no reason was recorded"
        return None

    def by_length(self, name: str | None, key: str) -> dict[int, float]:
        """Values by length of `recall`, `forward_ms`, `backward_ms`, `decode_ms` or `peak_bytes.forward`."""
        node: Any = self.summary(name)
        for part in key.split("."):
            node = node.get(part) or {}
        values = {int(length): number(value) for length, value in node.items()}
        return {length: value for length, value in sorted(values.items()) if value is not None}

    def common_length(self, key: str) -> int | None:
        """The longest length that all mechanisms with any value share, else the longest of all."""
        reached = [set(values) for name in self.names if (values := self.by_length(name, key))]
        return max(set.intersection(*reached) or set.union(*reached)) if reached else None

    def lengths(self, key: str) -> list[int]:
        return sorted({length for name in self.names for length in self.by_length(name, key)})

    def chance(self, length: int) -> float | None:
        found = (number(cell.get("chance")) for cell in self.cells("recall", length=length))
        return next((chance for chance in found if chance is not None), None)


def number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None
