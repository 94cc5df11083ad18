"""A figure of curves with points, beside each other on logarithmic x axes, as an svg that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, GAP, LEGEND = 380, 300, 52, 40, 64, 190
COLOURS = (
    "#000000",
    "#7f7f7f",
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#17becf",
    "#8c564b",
    "#e377c2",
)
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-4 -4h8v8h-8z",
    "M0 -5l5 9h-10z",
    "M0 -5.5l4.5 5.5l-4.5 5.5l-4.5 -5.5z",
)


@dataclass(frozen=True)
class Curve:
    """Points (x, y, the low end of its bar) in order; y lies in 0..1."""

    name: str
    points: Sequence[tuple[float, float, float]]


def chart(title: str, panels: Sequence[tuple[str, Sequence[Curve]]]) -> str:
    """Panels of the same curves with what their x axis means, one legend on the right; y is accuracy."""
    names = list(dict.fromkeys(c.name for _, curves in panels for c in curves))
    looks = {n: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, n in enumerate(names)}
    pieces = [f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>']
    for at, (label, curves) in enumerate(panels):
        x0 = LEFT + at * (WIDTH + GAP)
        pieces.append(f'<g transform="translate({x0} {TOP})">{_panel(label, curves, looks)}</g>')
    wide, high = LEFT + len(panels) * (WIDTH + GAP) - GAP + LEGEND, TOP + HEIGHT + 48
    for at, (name, (colour, shape)) in enumerate(looks.items()):
        x, y = wide - LEGEND + 22, TOP + 12 + 17 * at
        pieces.append(f'<path transform="translate({x} {y})" d="{shape}" fill="{colour}"/>')
        pieces.append(f'<text x="{x + 12}" y="{y + 4}">{escape(name)}</text>')
    high = max(high, TOP + 17 * len(looks) + 20)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="{wide}" height="{high}" fill="#ffffff"/>{"".join(pieces)}</svg>\n'
    )


def _panel(label: str, curves: Sequence[Curve], looks: dict[str, tuple[str, str]]) -> str:
    """One pair of axes with its curves, its corner at 0, 0."""
    every = [x for c in curves for x, _, _ in c.points] or [1.0, 2.0]
    low, high = math.log10(min(every)) - 0.1, math.log10(max(every)) + 0.1

    def across(x: float) -> float:
        return round((math.log10(x) - low) / (high - low) * WIDTH, 1)

    def down(y: float) -> float:
        return round((1 - y) * HEIGHT, 1)

    drawn = [f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="#444"/>']
    for tenth in range(0, 11, 2):
        y = down(tenth / 10)
        drawn.append(f'<path d="M0 {y}h{WIDTH}" stroke="#e4e4e4"/>')
        drawn.append(f'<text x="-8" y="{y + 4}" text-anchor="end">{tenth / 10:g}</text>')
    heads = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [n * 10.0**power for power in range(math.floor(low), math.ceil(high)) for n in heads]
    for tick in ticks:
        if low <= math.log10(tick) <= high:
            x = across(tick)
            drawn.append(f'<path d="M{x} {HEIGHT}v5" stroke="#444"/>')
            drawn.append(f'<text x="{x}" y="{HEIGHT + 18}" text-anchor="middle">{_short(tick)}</text>')
    drawn.append(f'<text x="{WIDTH / 2}" y="{HEIGHT + 38}" text-anchor="middle">{escape(label)}</text>')
    drawn.append(
        f'<text transform="translate(-36 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">accuracy</text>'
    )
    for curve in curves:
        colour, shape = looks[curve.name]
        points = sorted(curve.points)
        line = " ".join(f"{across(x)},{down(y)}" for x, y, _ in points)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.6"/>')
        for x, y, worst in points:
            drawn.append(
                f'<path d="M{across(x)} {down(y)}V{down(worst)}" stroke="{colour}" stroke-opacity="0.35"/>'
            )
            drawn.append(
                f'<path transform="translate({across(x)} {down(y)})" d="{shape}" fill="{colour}">'
                f"<title>{escape(curve.name)}: {_short(x)}, accuracy {y:.3f}</title></path>"
            )
    return "".join(drawn)


def _short(x: float) -> str:
    """A number with a unit where it is long: 16, 0.5, 4k, 2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"
