"""The page: the results, the long run beside them, tables, charts and pictures in one template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from saccade.bench.report.charts import Group, beside_chart, groups
from saccade.bench.report.run import Run, number
from saccade.bench.report.table import table
from saccade.bench.report.words import breakable, duration, lengths_text
from saccade.insight.draw import Picture

SCHEMA = 1

_SHORT_RUN = "What a short run cannot tell"
_COLORS = 7  # --c0 to --c6 in report.css
_SYMBOLS = ("square", "diamond", "triangle-up", "triangle-down", "circle")
_DASHES = ("solid", "dash", "dot", "dashdot")
_SHADES = 8


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
    short = Run(results)
    long = Run(results["long_run"]) if results.get("long_run") else None
    drawn = groups(short)
    beside = (
        Group("", "", [beside_chart(short, "This run"), beside_chart(long, "Long run")]) if long else None
    )
    figures = {c.id: c.figure for group in [*drawn, beside] if group for c in group.charts if c.figure}
    caveats = list(results.get("caveats") or [])
    told = [c for c in caveats if long and c.startswith(_SHORT_RUN)]
    added = [c for c in (results.get("long_run") or {}).get("caveats") or [] if c not in caveats]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "lengths": lengths_text, "breakable": breakable}
    return environment.get_template("report.html.j2").render(
        results=results,
        long_run=results.get("long_run"),
        table=table(short),
        long_table=table(long, beside=short) if long else None,
        groups=drawn,
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


def _pattern(mechanism: Mapping[str, Any]) -> dict[str, Any] | None:
    """The matrix of which keys each query reads as svg paths, one a shade; None where there is none."""
    matrix = mechanism.get("pattern")
    if not matrix:
        return None
    picture = Picture.of(mechanism["name"], ([number(w) or 0.0 for w in row] for row in matrix))
    return {
        "rows": len(matrix),
        "columns": max(len(row) for row in matrix),
        "read": sum(w > 0 for row in picture.weights for w in row),
        "paths": picture.paths(_SHADES),
    }
