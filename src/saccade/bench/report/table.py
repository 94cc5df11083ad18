"""The table of the page: a row a mechanism."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from saccade.bench.report.run import Run
from saccade.bench.report.words import (
    DASH,
    WHATS,
    bytes_text,
    ms_text,
    percent,
    significant,
)


@dataclass(frozen=True)
class Cell:
    text: str = DASH
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Column:
    group: str
    head: str
    note: str
    cell: Callable[[str], Cell]
    noise: str = ""


@dataclass(frozen=True)
class Row:
    mechanism: Mapping[str, Any]
    cells: list[Cell]
    failed: str | None = None


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    groups: list[tuple[str, int]]
    rows: list[Row]


def table(run: Run, beside: Run | None = None) -> Table:
    """One row a mechanism; `beside` adds the bits per byte of another run."""
    columns = [_bits_column(run, "Bits per\u00a0byte", "lower is better")]
    if beside:
        columns.append(_bits_column(beside, "Short run", ""))
    columns += [_recall_column(run, length) for length in run.lengths("recall")]
    columns += [_time_column(run, what) for what in WHATS]
    columns.append(_memory_column(run, "backward" if run.lengths("peak_bytes.backward") else "forward"))
    columns += _scaling_columns(run)
    failures = {name: error for name in run.names if (error := run.failure(name))}
    measured = [name for name in run.names if name not in failures]
    columns = [column for column in columns if any(column.cell(name).text != DASH for name in measured)]
    columns.append(Column("", "Verdict", "", lambda name: _verdict(run, name)))
    rows = []
    for mechanism in run.mechanisms:
        failed = failures.get(mechanism["name"])
        rows.append(Row(mechanism, [] if failed else [c.cell(mechanism["name"]) for c in columns], failed))
    groups = [(group, len(list(members))) for group, members in groupby(columns, key=lambda c: c.group)]
    return Table(columns, groups, rows)


def _bits_column(run: Run, head: str, note: str) -> Column:
    base, noise = run.number(run.reference, "bits_per_byte"), run.noise("bits_per_byte")

    def cell(name: str) -> Cell:
        value, spread = run.number(name, "bits_per_byte"), run.number(name, "bits_per_byte_spread")
        if value is None:
            return Cell()
        text = f"{value:.2f}" + (f" \u00b1 {spread:.2f}" if spread is not None and spread >= 0.005 else "")
        if name == run.reference or base is None:
            return Cell(text)
        if run.summary(name).get("quality_tie"):
            return Cell(text, "tie", "tie")
        return Cell(text, f"{value - base:+.2f}".replace("-", "\u2212"))

    return Column("Quality", head, note, cell, _plus_minus(noise, "{:.2f}"))


def _recall_column(run: Run, length: int) -> Column:
    chance, noise = run.chance(length), run.noise("recall")

    def cell(name: str) -> Cell:
        value = run.by_length(name, "recall").get(length)
        if value is None:
            return Cell()
        if chance is not None and value - chance <= (noise or 0):
            return Cell(percent(value), "chance", "muted")
        return Cell(percent(value))

    note = f"chance {percent(chance)}" if chance is not None else ""
    return Column("Recall", f"at\u00a0{length:,}", note, cell, _plus_minus(noise, "{:.0%}"))


def _time_column(run: Run, what: str) -> Column:
    length, noise = run.common_length(f"{what}_ms") or 0, run.noise(what)
    head = WHATS[what].replace("-", "\u2011").replace("+ ", "+\u00a0")
    cell = _against_reference(run, f"{what}_ms", length, ms_text, noise)
    return Column(f"Time at {length:,} tokens", head, "", cell, _plus_minus(noise, "{:.0%}"))


def _memory_column(run: Run, what: str) -> Column:
    length = run.common_length(f"peak_bytes.{what}") or 0
    cell = _against_reference(run, f"peak_bytes.{what}", length, bytes_text, None)
    return Column("Memory", "Peak", f"{WHATS[what].lower()}, {length:,} tokens", cell)


def _against_reference(
    run: Run, key: str, length: int, show: Callable[[float], str], noise: float | None
) -> Callable[[str], Cell]:
    base = run.by_length(run.reference, key).get(length)

    def cell(name: str) -> Cell:
        value = run.by_length(name, key).get(length)
        if value is None:
            return Cell()
        if name == run.reference or not base:
            return Cell(show(value))
        if noise is not None and abs(value / base - 1) <= noise:
            return Cell(show(value), "tie", "tie")
        return Cell(show(value), f"{significant(value / base, 2)}\u00d7")

    return cell


def _plus_minus(noise: float | None, form: str) -> str:
    return f"\u00b1 {form.format(noise)}" if noise is not None else ""


def _scaling_columns(run: Run) -> list[Column]:
    longest = max(run.lengths("forward_ms"), default=None)

    def exponent(name: str) -> Cell:
        value = run.number(name, "exponent")
        return Cell() if value is None else Cell(f"{value:.2f}")

    def faster_from(name: str) -> Cell:
        length = run.number(name, "faster_from")
        if length is not None:
            return Cell(f"{length:,.0f}")
        compared = name != run.reference and run.by_length(name, "forward_ms")
        return Cell("never", f"up to {longest:,}", "muted") if compared else Cell()

    return [
        Column("Scaling", "Cost exponent", "time ~ length^x", exponent),
        Column("Scaling", "Faster than full", "from this length", faster_from),
    ]


def _verdict(run: Run, name: str) -> Cell:
    entry, errors = run.summary(name), run.errors(name)
    return Cell(entry.get("verdict") or ("" if entry else "not measured yet"), errors[0] if errors else "")
