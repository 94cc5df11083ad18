"""The charts of the page. A figure says what is drawn: axes, lines of (x, y, what the pointer reads), a guide; report.js says how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saccade.bench.report.run import Run, number
from saccade.bench.report.words import (
    WHATS,
    bytes_text,
    ms_text,
    percent,
)


@dataclass(frozen=True)
class Chart:
    """A figure, or None and the line that stands in its place."""

    id: str
    title: str
    label: str
    figure: dict[str, Any] | None
    missing: str
    names: list[str]
    absent: list[str]


@dataclass(frozen=True)
class Group:
    """Charts that share a heading, a sentence and a key of mechanisms."""

    title: str
    about: str
    charts: list[Chart]

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
    run: Run, id: str, title: str, label: str, missing: str, lines: list[_Line], **figure: Any
) -> Chart:
    drawn = {line["name"] for line in lines}
    present = [name for name in run.names if name in drawn]
    absent = [name for name in run.names if name not in drawn]
    return Chart(id, title, label, {"lines": lines, **figure} if lines else None, missing, present, absent)


def _quality_chart(run: Run, id: str, title: str = "") -> Chart:
    length = run.common_length("backward_ms") or 0
    noise, base = run.noise("bits_per_byte"), run.number(run.reference, "bits_per_byte")
    lines: list[_Line] = []
    for name in run.names:
        cost, bits = run.by_length(name, "backward_ms").get(length), run.number(name, "bits_per_byte")
        if cost and bits is not None:
            point = (cost, bits, f"{bits:.2f} bits per byte, {ms_text(cost)}")
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


def beside_chart(run: Run, kind: str) -> Chart:
    settings = run.results.get("settings") or {}
    tokens, seeds = number(settings.get("tokens")), len(settings.get("seeds") or [])
    title = [
        kind,
        f"{tokens:,.0f} tokens" if tokens else "",
        f"{seeds} seed{'s' * (seeds > 1)}" if seeds else "",
    ]
    return _quality_chart(run, kind.lower().replace(" ", "-"), ", ".join(filter(None, title)))


def _length_chart(run: Run, id: str, title: str, quantity: str, key: str, kind: str) -> Chart:
    show = ms_text if kind == "ms" else bytes_text
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


def _spread(run: Run, name: str, key: str, length: int) -> str:
    """The tenth to ninetieth percentile of a time, where the cell has them."""
    cells = run.cells("speed", mechanism=name, what=key.removesuffix("_ms"), length=length)
    low, high = (number(cells[0].get(p)) if cells else None for p in ("p10_ms", "p90_ms"))
    return f" ({ms_text(low)} to {ms_text(high)})" if low is not None and high is not None else ""


def _recall_chart(run: Run) -> Chart:
    lines: list[_Line] = []
    for name in run.names:
        points = []
        for length, accuracy in run.by_length(name, "recall").items():
            cells = run.cells("recall", mechanism=name, length=length)
            reach = next((f", {cell['reach']}" for cell in cells if cell.get("reach")), "")
            points.append((length, accuracy, f"{length:,} tokens: {percent(accuracy)}{reach}"))
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


def _training_chart(run: Run) -> Chart:
    lines: list[_Line] = []
    for name in run.names:
        for cell in run.cells("quality", mechanism=name):
            known = [
                (t, b) for t, b in cell.get("curve") or [] if number(t) is not None and number(b) is not None
            ]
            seed = f", seed {cell['seed']}" if cell.get("seed") is not None else ""
            lines += _line(name, [(t, b, f"{t:,} tokens: {b:.2f} bits per byte{seed}") for t, b in known])
    ends = [tokens for line in lines for tokens, _, _ in line["points"]]
    baselines = [b for cell in run.cells("quality") if (b := number(cell.get("baseline"))) is not None]
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


def groups(run: Run) -> list[Group]:
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
    times = [_length_chart(run, f"time-{w}", t, "time", f"{w}_ms", "ms") for w, t in WHATS.items()]
    peaks = [
        _length_chart(run, f"memory-{w}", t, "peak memory", f"peak_bytes.{w}", "bytes")
        for w, t in WHATS.items()
    ]
    return [
        Group("Quality against cost", cost, [quality]),
        Group("Time against length", time, times),
        Group("Peak memory against length", memory, peaks),
        Group("Recall and training", "", [_recall_chart(run), _training_chart(run)]),
    ]
