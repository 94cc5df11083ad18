"""What the cells of a comparison say: means and spread, noise, ties, growth, advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

import numpy as np

WHATS = ("forward", "backward", "decode")
_UPPER = 1024  # the exponent is fitted from here up, where fixed costs no longer show
_LEAST_BITS, _LEAST_TIME = 0.005, 0.02  # differences below these are never told apart

Cell = Mapping[str, Any]


class Table:
    """Finished cells, asked by kind and fields."""

    def __init__(self, cells: Mapping[str, Cell]) -> None:
        self.all = list(cells.values())
        self.ok = [cell for cell in self.all if cell.get("status") == "ok"]

    def find(self, kind: str, **wanted: object) -> list[Cell]:
        """Finished cells of a kind whose fields equal those wanted."""
        return [c for c in self.ok if c["kind"] == kind and all(c.get(k) == v for k, v in wanted.items())]

    def bits(self, name: str) -> dict[int, float]:
        """Held-out bits per byte, by seed."""
        return {c["seed"]: c["bits_per_byte"] for c in self.find("quality", mechanism=name)}

    def recall(self, name: str) -> dict[int, list[float]]:
        """Accuracies of all seeds, by length."""
        found: dict[int, list[float]] = {}
        for cell in sorted(self.find("recall", mechanism=name), key=lambda c: c["length"]):
            found.setdefault(cell["length"], []).append(cell["accuracy"])
        return found

    def speed(self, name: str, what: str, field: str = "median_ms") -> dict[int, float]:
        """Times or peaks, by length."""
        cells = sorted(self.find("speed", mechanism=name, what=what), key=lambda c: c["length"])
        return {c["length"]: c[field] for c in cells if c.get(field) is not None}

    def errors(self, name: str) -> list[str]:
        """Why cells failed, each reason once."""
        failed = [c for c in self.all if c.get("mechanism") == name and c.get("status") == "failed"]
        return list(dict.fromkeys(c["error"] for c in failed))


def noise(
    table: Table, reference: str, twin: str | None, candidates: Sequence[str]
) -> dict[str, float | None]:
    """The difference that must be exceeded: absolute for bits per byte and recall, relative for times.

    Between the reference and its twin only chance differs, so what separates them separates nothing else. Beside
    that stands the spread over seeds, held-out windows, questions and repeated calls.
    """
    everyone = [reference, *([twin] if twin else []), *candidates]
    return {
        "bits_per_byte": _bits_noise(table, reference, twin, everyone),
        "recall": _recall_noise(table, reference, twin, everyone),
        **{what: _time_noise(table, what) for what in WHATS},
    }


def _bits_noise(table: Table, reference: str, twin: str | None, everyone: Sequence[str]) -> float | None:
    if not table.find("quality"):
        return None
    apart = _paired(table.bits(reference), table.bits(twin)) if twin else []
    seeds = [stdev(b) / math.sqrt(len(b)) for n in everyone if len(b := list(table.bits(n).values())) > 1]
    windows = [
        error
        for n in everyone
        if n not in (reference, twin) and (error := _window_error(table, reference, n))
    ]
    bounds = [
        abs(mean(apart)) if apart else 0,
        2 * mean(seeds) if seeds else 0,
        2 * median(windows) if windows else 0,
    ]
    return max(*bounds, _LEAST_BITS)


def _window_error(table: Table, one: str, other: str) -> float | None:
    """Standard error of the mean difference over the same held-out windows, first common seed."""
    left = {c["seed"]: c.get("window_bits") for c in table.find("quality", mechanism=one)}
    right = {c["seed"]: c.get("window_bits") for c in table.find("quality", mechanism=other)}
    for seed, windows in left.items():
        others = right.get(seed)
        if windows and others and len(windows) == len(others) > 1:
            return stdev(a - b for a, b in zip(windows, others, strict=True)) / math.sqrt(len(windows))
    return None


def _recall_noise(table: Table, reference: str, twin: str | None, everyone: Sequence[str]) -> float | None:
    cells = table.find("recall")
    if not cells:
        return None
    left, right = table.recall(reference), table.recall(twin or "")
    apart = [abs(mean(left[n]) - mean(right[n])) for n in left.keys() & right.keys()]
    seeds = [stdev(a) / math.sqrt(len(a)) for n in everyone for a in table.recall(n).values() if len(a) > 1]
    counting = 2 * math.sqrt(0.25 / min(c["questions"] for c in cells))
    return (
        max(*apart, 2 * mean(seeds) if seeds else 0, counting)
        if apart
        else max(2 * mean(seeds) if seeds else 0, counting)
    )


def _time_noise(table: Table, what: str) -> float | None:
    """Half the distance from the tenth to the ninetieth percentile, beside the median time."""
    cells = table.find("speed", what=what)
    halves = [(c["p90_ms"] - c["p10_ms"]) / (2 * c["median_ms"]) for c in cells if len(c["samples_ms"]) > 1]
    return max(median(halves), _LEAST_TIME) if halves else None


def _paired(left: Mapping[int, float], right: Mapping[int, float]) -> list[float]:
    return [left[key] - right[key] for key in left.keys() & right.keys()]


def exponent(times: Mapping[int, float]) -> float | None:
    """x in time ~ length^x by least squares in logs, over the upper lengths."""
    upper = {n: t for n, t in times.items() if n >= _UPPER and t > 0}
    points = upper if len(upper) > 1 else {n: t for n, t in times.items() if t > 0}
    if len(points) < 2:
        return None
    return float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])


def faster_from(times: Mapping[int, float], reference: Mapping[int, float], margin: float) -> int | None:
    """The first length from which every measured time beats the reference by more than the margin."""
    first = None
    for length in sorted(times.keys() & reference.keys(), reverse=True):
        if times[length] >= reference[length] * (1 - margin):
            break
        first = length
    return first


def summarise(
    table: Table, names: Sequence[str], reference: str, noises: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """One entry a mechanism, in the order of `names`."""
    return [_entry(table, name, reference, noises) for name in names]


def _entry(table: Table, name: str, reference: str, noises: Mapping[str, float | None]) -> dict[str, Any]:
    bits, base = list(table.bits(name).values()), list(table.bits(reference).values())
    recall = {str(n): mean(a) for n, a in table.recall(name).items()}
    times = {what: table.speed(name, what) for what in WHATS}
    errors = table.errors(name)
    measured = bool(bits or recall or any(times.values()))
    entry: dict[str, Any] = {
        "name": name,
        "bits_per_byte": mean(bits) if bits else None,
        "bits_per_byte_spread": stdev(bits) if len(bits) > 1 else None,
        "quality_tie": None,
        "recall": recall,
        **{f"{what}_ms": _by_text(times[what]) for what in WHATS},
        "peak_bytes": {what: _by_text(table.speed(name, what, "peak_bytes")) for what in WHATS},
        "exponent": exponent(times["forward"]),
        "faster_from": None,
        "status": "failed" if errors and not measured else "partial" if errors else "ok",
        "error": errors[0] if errors else None,
    }
    if bits and base and noises["bits_per_byte"] is not None:
        entry["quality_tie"] = abs(mean(bits) - mean(base)) <= noises["bits_per_byte"]
    if name != reference:
        entry["faster_from"] = faster_from(
            times["forward"], table.speed(reference, "forward"), noises["forward"] or 0
        )
    return entry


def _by_text(values: Mapping[int, float]) -> dict[str, float]:
    return {str(n): value for n, value in values.items()}
