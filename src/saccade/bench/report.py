"""The report page of `saccade compare`: one html file that works offline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from saccade.insight.draw import Picture

SCHEMA = 1

_WHATS = {"forward": "Forward", "backward": "Forward + backward", "decode": "One-token decode"}
_SHORT_RUN = "What a short run cannot tell"
_COLORS = 7  # --c0 to --c6 in report.css
_SYMBOLS = ("square", "diamond", "triangle-up", "triangle-down", "circle")
_DASHES = ("solid", "dash", "dot", "dashdot")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SHADES = 8
_DASH = "\u2013"


def write(results: Mapping[str, Any], path: Path) -> Path:
    """Render the results of `saccade compare` (schema 1) into one self-contained html page; returns `path`.

    Any measured number may be None, NaN or absent, and any cell missing or failed. Raises ValueError for another
    schema, OSError where `path` cannot be written.
    """
    for document in (results, results.get("long_run") or results):
        if document.get("schema") != SCHEMA:
            raise ValueError(
                f"results of schema {document.get('schema')!r} were given and this page draws {SCHEMA}: "
                "measure again with `saccade compare --fresh`"
            )
    path.write_text(_render(results), encoding="utf-8")
    return path


def _render(results: Mapping[str, Any]) -> str:
    short = _Run(results)
    long = _Run(results["long_run"]) if results.get("long_run") else None
    groups = _groups(short)
    beside = (
        _Group("", "", [_beside_chart(short, "This run"), _beside_chart(long, "Long run")]) if long else None
    )
    figures = {c.id: c.figure for group in [*groups, beside] if group for c in group.charts if c.figure}
    caveats = list(results.get("caveats") or [])
    told = [c for c in caveats if long and c.startswith(_SHORT_RUN)]
    added = [c for c in (results.get("long_run") or {}).get("caveats") or [] if c not in caveats]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": _duration, "lengths": _lengths, "breakable": _breakable}
    return environment.get_template("report.html.j2").render(
        results=results,
        long_run=results.get("long_run"),
        table=_table(short),
        long_table=_table(long, beside=short) if long else None,
        groups=groups,
        long_group=beside,
        patterns=[(m, _pattern(m)) for m in short.mechanisms],
        long_caveats=told + added,
        caveats=[c for c in caveats if c not in told],
        reference=short.reference,
        twins=[m["name"] for m in short.mechanisms if m.get("role") == "twin"],
        styles=_styles(results),
        figures=figures,
        plotly=get_plotlyjs(),
    )


# The results ----------------------------------------------------------------------------------------------


def _styles(results: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """How each mechanism looks in every chart; a color names a custom property of report.css."""
    styles: dict[str, dict[str, str]] = {}
    candidates = 0
    for mechanism in (*results["mechanisms"], *(results.get("long_run") or {}).get("mechanisms", [])):
        name, role = mechanism["name"], mechanism.get("role")
        if name in styles:
            continue
        if role == "reference":
            styles[name] = {"color": "--reference", "dash": "solid", "symbol": "circle"}
        elif role == "twin":
            styles[name] = {"color": "--twin", "dash": "dash", "symbol": "circle-open"}
        else:
            lap, color = divmod(candidates, _COLORS)
            dash, symbol = _DASHES[lap % len(_DASHES)], _SYMBOLS[candidates % len(_SYMBOLS)]
            styles[name] = {"color": f"--c{color}", "dash": dash, "symbol": symbol}
            candidates += 1
    return styles


class _Run:
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
        return _number(self.summary(name).get(key))

    def noise(self, key: str) -> float | None:
        return _number((self.results.get("noise") or {}).get(key))

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
        values = {int(length): _number(value) for length, value in node.items()}
        return {length: value for length, value in sorted(values.items()) if value is not None}

    def common_length(self, key: str) -> int | None:
        """The longest length that all mechanisms with any value share, else the longest of all."""
        reached = [set(values) for name in self.names if (values := self.by_length(name, key))]
        return max(set.intersection(*reached) or set.union(*reached)) if reached else None

    def lengths(self, key: str) -> list[int]:
        return sorted({length for name in self.names for length in self.by_length(name, key)})

    def chance(self, length: int) -> float | None:
        found = (_number(cell.get("chance")) for cell in self.cells("recall", length=length))
        return next((chance for chance in found if chance is not None), None)


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


# Numbers for people ---------------------------------------------------------------------------------------


def _significant(value: float, digits: int = 3) -> str:
    value = float(f"{value:.{digits}g}")
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def _ms(value: float) -> str:
    return f"{_significant(value)} ms" if value < 999.5 else f"{_significant(value / 1000)} s"


def _bytes(value: float) -> str:
    power = min(int(math.log(max(value, 1), 1024)), len(_UNITS) - 1)
    return f"{_significant(value / 1024**power)} {_UNITS[power]}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _lengths(values: Iterable[int]) -> str:
    return ", ".join(f"{n:,}" for n in values)


def _breakable(name: str) -> Markup:
    """A name that may break after an underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


# The table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    text: str = _DASH
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class _Column:
    group: str
    head: str
    note: str
    cell: Callable[[str], _Cell]
    noise: str = ""


@dataclass(frozen=True)
class _Row:
    mechanism: Mapping[str, Any]
    cells: list[_Cell]
    failed: str | None = None


@dataclass(frozen=True)
class _Table:
    columns: list[_Column]
    groups: list[tuple[str, int]]
    rows: list[_Row]


def _table(run: _Run, beside: _Run | None = None) -> _Table:
    """One row a mechanism; `beside` adds the bits per byte of another run."""
    columns = [_bits_column(run, "Bits per\u00a0byte", "lower is better")]
    if beside:
        columns.append(_bits_column(beside, "Short run", ""))
    columns += [_recall_column(run, length) for length in run.lengths("recall")]
    columns += [_time_column(run, what) for what in _WHATS]
    columns.append(_memory_column(run, "backward" if run.lengths("peak_bytes.backward") else "forward"))
    columns += _scaling_columns(run)
    failures = {name: error for name in run.names if (error := run.failure(name))}
    measured = [name for name in run.names if name not in failures]
    columns = [column for column in columns if any(column.cell(name).text != _DASH for name in measured)]
    columns.append(_Column("", "Verdict", "", lambda name: _verdict(run, name)))
    rows = []
    for mechanism in run.mechanisms:
        failed = failures.get(mechanism["name"])
        rows.append(_Row(mechanism, [] if failed else [c.cell(mechanism["name"]) for c in columns], failed))
    groups = [(group, len(list(members))) for group, members in groupby(columns, key=lambda c: c.group)]
    return _Table(columns, groups, rows)


def _bits_column(run: _Run, head: str, note: str) -> _Column:
    base, noise = run.number(run.reference, "bits_per_byte"), run.noise("bits_per_byte")

    def cell(name: str) -> _Cell:
        value, spread = run.number(name, "bits_per_byte"), run.number(name, "bits_per_byte_spread")
        if value is None:
            return _Cell()
        text = f"{value:.2f}" + (f" \u00b1 {spread:.2f}" if spread is not None and spread >= 0.005 else "")
        if name == run.reference or base is None:
            return _Cell(text)
        if run.summary(name).get("quality_tie"):
            return _Cell(text, "tie", "tie")
        return _Cell(text, f"{value - base:+.2f}".replace("-", "\u2212"))

    return _Column("Quality", head, note, cell, _plus_minus(noise, "{:.2f}"))


def _recall_column(run: _Run, length: int) -> _Column:
    chance, noise = run.chance(length), run.noise("recall")

    def cell(name: str) -> _Cell:
        value = run.by_length(name, "recall").get(length)
        if value is None:
            return _Cell()
        if chance is not None and value - chance <= (noise or 0):
            return _Cell(_percent(value), "chance", "muted")
        return _Cell(_percent(value))

    note = f"chance {_percent(chance)}" if chance is not None else ""
    return _Column("Recall", f"at\u00a0{length:,}", note, cell, _plus_minus(noise, "{:.0%}"))


def _time_column(run: _Run, what: str) -> _Column:
    length, noise = run.common_length(f"{what}_ms") or 0, run.noise(what)
    head = _WHATS[what].replace("-", "\u2011").replace("+ ", "+\u00a0")
    cell = _against_reference(run, f"{what}_ms", length, _ms, noise)
    return _Column(f"Time at {length:,} tokens", head, "", cell, _plus_minus(noise, "{:.0%}"))


def _memory_column(run: _Run, what: str) -> _Column:
    length = run.common_length(f"peak_bytes.{what}") or 0
    cell = _against_reference(run, f"peak_bytes.{what}", length, _bytes, None)
    return _Column("Memory", "Peak", f"{_WHATS[what].lower()}, {length:,} tokens", cell)


def _against_reference(
    run: _Run, key: str, length: int, show: Callable[[float], str], noise: float | None
) -> Callable[[str], _Cell]:
    base = run.by_length(run.reference, key).get(length)

    def cell(name: str) -> _Cell:
        value = run.by_length(name, key).get(length)
        if value is None:
            return _Cell()
        if name == run.reference or not base:
            return _Cell(show(value))
        if noise is not None and abs(value / base - 1) <= noise:
            return _Cell(show(value), "tie", "tie")
        return _Cell(show(value), f"{_significant(value / base, 2)}\u00d7")

    return cell


def _plus_minus(noise: float | None, form: str) -> str:
    return f"\u00b1 {form.format(noise)}" if noise is not None else ""


def _scaling_columns(run: _Run) -> list[_Column]:
    longest = max(run.lengths("forward_ms"), default=None)

    def exponent(name: str) -> _Cell:
        value = run.number(name, "exponent")
        return _Cell() if value is None else _Cell(f"{value:.2f}")

    def faster_from(name: str) -> _Cell:
        length = run.number(name, "faster_from")
        if length is not None:
            return _Cell(f"{length:,.0f}")
        compared = name != run.reference and run.by_length(name, "forward_ms")
        return _Cell("never", f"up to {longest:,}", "muted") if compared else _Cell()

    return [
        _Column("Scaling", "Cost exponent", "time ~ length^x", exponent),
        _Column("Scaling", "Faster than full", "from this length", faster_from),
    ]


def _verdict(run: _Run, name: str) -> _Cell:
    entry, errors = run.summary(name), run.errors(name)
    return _Cell(entry.get("verdict") or ("" if entry else "not measured yet"), errors[0] if errors else "")


# Charts ---------------------------------------------------------------------------------------------------
# A figure says what is drawn: axes, lines of (x, y, what the pointer reads), a guide; report.js says how.


@dataclass(frozen=True)
class _Chart:
    """A figure, or None and the line that stands in its place."""

    id: str
    title: str
    label: str
    figure: dict[str, Any] | None
    missing: str
    names: list[str]
    absent: list[str]


@dataclass(frozen=True)
class _Group:
    """Charts that share a heading, a sentence and a key of mechanisms."""

    title: str
    about: str
    charts: list[_Chart]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for chart in self.charts for name in chart.names))

    @property
    def absent(self) -> list[str]:
        """Mechanisms that none of the drawn charts shows."""
        drawn = [chart.absent for chart in self.charts if chart.figure]
        return [name for name in drawn[0] if all(name in absent for absent in drawn)] if drawn else []


_Line = dict[str, Any]


def _line(name: str, points: Sequence[tuple[float, float, str]], **more: Any) -> list[_Line]:
    return [{"name": name, "points": points, **more}] if points else []


def _chart(
    run: _Run, id: str, title: str, label: str, missing: str, lines: list[_Line], **figure: Any
) -> _Chart:
    drawn = {line["name"] for line in lines}
    present = [name for name in run.names if name in drawn]
    absent = [name for name in run.names if name not in drawn]
    return _Chart(id, title, label, {"lines": lines, **figure} if lines else None, missing, present, absent)


def _quality_chart(run: _Run, id: str, title: str = "") -> _Chart:
    length = run.common_length("backward_ms") or 0
    noise, base = run.noise("bits_per_byte"), run.number(run.reference, "bits_per_byte")
    lines: list[_Line] = []
    for name in run.names:
        cost, bits = run.by_length(name, "backward_ms").get(length), run.number(name, "bits_per_byte")
        if cost and bits is not None:
            point = (cost, bits, f"{bits:.2f} bits per byte, {_ms(cost)}")
            lines += _line(name, [point], spread=run.number(name, "bits_per_byte_spread"))
    return _chart(
        run,
        id,
        title,
        "Bits per byte against forward plus backward time, one mark a mechanism. Lower left is better.",
        "No chart: no mechanism has both bits per byte and a forward + backward time.",
        lines,
        x={"kind": "ms", "title": f"forward + backward at {length:,} tokens"},
        y={"kind": "bits", "title": "bits per byte"},
        labels=True,
        band=[base - noise, base + noise] if noise and base is not None else None,
    )


def _beside_chart(run: _Run, kind: str) -> _Chart:
    settings = run.results.get("settings") or {}
    tokens, seeds = _number(settings.get("tokens")), len(settings.get("seeds") or [])
    title = [
        kind,
        f"{tokens:,.0f} tokens" if tokens else "",
        f"{seeds} seed{'s' * (seeds > 1)}" if seeds else "",
    ]
    return _quality_chart(run, kind.lower().replace(" ", "-"), ", ".join(filter(None, title)))


def _length_chart(run: _Run, id: str, title: str, quantity: str, key: str, kind: str) -> _Chart:
    show = _ms if kind == "ms" else _bytes
    lines: list[_Line] = []
    for name in run.names:
        values = {n: v for n, v in run.by_length(name, key).items() if v > 0}
        spread = {n: _spread(run, name, key, n) for n in values}
        lines += _line(name, [(n, v, f"{n:,} tokens: {show(v)}{spread[n]}") for n, v in values.items()])
    return _chart(
        run,
        id,
        title,
        f"{title}: {quantity} against length, both axes logarithmic, one line a mechanism.",
        f"No chart: no {quantity} was measured for {title.lower()}.",
        lines,
        x={"kind": "length", "title": "tokens"},
        y={"kind": kind, "title": ""},
    )


def _spread(run: _Run, name: str, key: str, length: int) -> str:
    """The tenth to ninetieth percentile of a time, where the cell has them."""
    cells = run.cells("speed", mechanism=name, what=key.removesuffix("_ms"), length=length)
    low, high = (_number(cells[0].get(p)) if cells else None for p in ("p10_ms", "p90_ms"))
    return f" ({_ms(low)} to {_ms(high)})" if low is not None and high is not None else ""


def _recall_chart(run: _Run) -> _Chart:
    lines: list[_Line] = []
    for name in run.names:
        points = []
        for length, accuracy in run.by_length(name, "recall").items():
            cells = run.cells("recall", mechanism=name, length=length)
            reach = next((f", {cell['reach']}" for cell in cells if cell.get("reach")), "")
            points.append((length, accuracy, f"{length:,} tokens: {_percent(accuracy)}{reach}"))
        lines += _line(name, points)
    chances = [(n, chance) for n in run.lengths("recall") if (chance := run.chance(n)) is not None]
    return _chart(
        run,
        "recall",
        "Recall against length",
        "Recall accuracy against length, one line a mechanism, with a dotted line at chance.",
        "No chart: recall was not measured.",
        lines,
        x={"kind": "length", "title": "tokens"},
        y={"kind": "share", "title": "accuracy"},
        guide={"text": "chance", "points": chances, "at": "left"},
    )


def _training_chart(run: _Run) -> _Chart:
    lines: list[_Line] = []
    for name in run.names:
        for cell in run.cells("quality", mechanism=name):
            known = [
                (t, b)
                for t, b in cell.get("curve") or []
                if _number(t) is not None and _number(b) is not None
            ]
            seed = f", seed {cell['seed']}" if cell.get("seed") is not None else ""
            lines += _line(name, [(t, b, f"{t:,} tokens: {b:.2f} bits per byte{seed}") for t, b in known])
    ends = [tokens for line in lines for tokens, _, _ in line["points"]]
    baselines = [b for cell in run.cells("quality") if (b := _number(cell.get("baseline"))) is not None]
    return _chart(
        run,
        "training",
        "Training curves",
        "Bits per byte against training tokens, one line a mechanism and seed.",
        "No chart: no training curve was recorded.",
        lines,
        x={"kind": "count", "title": "tokens"},
        y={"kind": "bits", "title": "bits per byte"},
        guide={
            "text": "byte frequencies alone",
            "points": [(x, b) for b in baselines[:1] for x in sorted({*ends})],
            "at": "right",
        },
    )


def _groups(run: _Run) -> list[_Group]:
    quality = _quality_chart(run, "quality")
    band = "Inside the grey band the difference from the reference is no larger than the noise: a tie."
    cost = "Lower is better, further left is cheaper."
    if quality.figure and quality.figure["band"]:
        cost = f"{cost} {band}"
    time = (
        "Medians. Both axes are logarithmic, so the slope of a line is its exponent: "
        "quadratic cost climbs twice as steeply as linear."
    )
    memory = "The most memory that one call held. Both axes are logarithmic."
    times = [_length_chart(run, f"time-{w}", t, "time", f"{w}_ms", "ms") for w, t in _WHATS.items()]
    peaks = [
        _length_chart(run, f"memory-{w}", t, "peak memory", f"peak_bytes.{w}", "bytes")
        for w, t in _WHATS.items()
    ]
    return [
        _Group("Quality against cost", cost, [quality]),
        _Group("Time against length", time, times),
        _Group("Peak memory against length", memory, peaks),
        _Group("Recall and training", "", [_recall_chart(run), _training_chart(run)]),
    ]


# Patterns -------------------------------------------------------------------------------------------------


def _pattern(mechanism: Mapping[str, Any]) -> dict[str, Any] | None:
    """The matrix of which keys each query reads as svg paths, one a shade; None where there is none."""
    matrix = mechanism.get("pattern")
    if not matrix:
        return None
    picture = Picture.of(mechanism["name"], ([_number(w) or 0.0 for w in row] for row in matrix))
    return {
        "rows": len(matrix),
        "columns": max(len(row) for row in matrix),
        "read": sum(w > 0 for row in picture.weights for w in row),
        "paths": picture.paths(_SHADES),
    }
