"""The report page of `saccade compare`: what it says, and what a real browser makes of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from browser import INSTALLED, MISSING, Browser, browser
from saccade.bench import report
from saccade.bench.report import words

SPEED = (512, 1024, 2048, 4096, 8192)
RECALL = (64, 320)
LONG_RECALL = (64, 320, 1024)
CHANCE = 0.03
TOKENS = 196_608
TEXT = "pydoc_data.topics"
REFERENCE, TWIN, WINDOW = "causal", "causal + memory_efficient_attention", "window(128)"
PERFORMER, LINEAR = "causal + performer_favor", "causal + linear"
TITLES = {"reference": "full attention", "twin": "full attention by another kernel", "candidate": None}

# name, text, role, bits per byte, recall by length, milliseconds at 8,192 tokens, exponent, keys read, verdict
MADE: tuple[tuple[str, str, str, float, tuple[float, ...], float, float, str, str], ...] = (
    (REFERENCE, "causal", "reference", 2.912, (0.99, 0.97, 0.95), 492, 1.95, "past", "the reference"),
    (TWIN, TWIN, "twin", 2.918, (0.98, 0.98, 0.94), 508, 1.96, "past", "quality tie, recalls, same speed at 8,192"),
    (WINDOW, "causal + window(128)", "candidate", 2.861, (0.98, 0.05, 0.04), 31, 1.04, "window",
     "0.05 bits better, loses recall at 320, 16x faster at 8,192"),
    ("moba", "moba(block=64, top=4)", "candidate", 2.925, (0.98, 0.91, 0.9), 96, 1.22, "blocks",
     "quality tie, loses recall at 320, 5.1x faster at 8,192"),
    (PERFORMER, PERFORMER, "candidate", 3.204, (0.41, 0.09, 0.04), 44, 1.02, "fade",
     "0.29 bits worse, loses recall at 64 and 320, 11x faster at 8,192"),
    (LINEAR, LINEAR, "candidate", 3.021, (0.62, 0.21, 0.07), 39, 1.01, "fade",
     "0.11 bits worse, loses recall at 64 and 320, 13x faster at 8,192"),
)  # fmt: skip
MEMORY = {"past": 1.6, "window": 0.9, "blocks": 1.2, "fade": 0.7}
COSTS = {"forward": 1.0, "backward": 3.1, "decode": 0.004}


def pattern(kind: str, n: int = 32) -> list[list[float]]:
    def weight(i: int, j: int) -> float:
        if j > i:
            return 0
        if kind == "window":
            return float(i - j < 8)
        if kind == "blocks":
            return float(i // 4 == j // 4 or (j // 4) % 3 == i // 4 % 3)
        return round(0.85 ** (i - j), 4) if kind == "fade" else 1

    return [[weight(i, j) for j in range(n)] for i in range(n)]


def document(
    seeds: tuple[int, ...] = (0,),
    tokens: int = TOKENS,
    better: float = 0.0,
    recall_lengths: tuple[int, ...] = RECALL,
) -> dict[str, Any]:
    """Results as a run of seven mechanisms would leave them; the seventh cannot be made causal."""
    cells: dict[str, Any] = {}
    mechanisms, summary = [], []
    for name, text, role, bits, recall, ms, exponent, kind, verdict in MADE:
        bits -= better * (1 if kind in ("past", "blocks") else 0.6)
        mechanisms.append(
            {
                "name": name,
                "text": text,
                "title": TITLES[role],
                "role": role,
                "asked": text,
                "state_note": "full cache" if exponent > 1.5 else "constant state",
                "cost": "O(n^2)" if exponent > 1.5 else "O(n)",
                "trains_on": "sdpa" if role == "reference" else "slab",
                "pattern": pattern(kind),
                "pattern_kind": "weights" if kind == "fade" else "pairs",
                "note": None,
            }
        )
        times = {
            what: {str(n): ms * share * (n / 8192) ** (exponent if what != "decode" else 0.9) for n in SPEED}
            for what, share in COSTS.items()
        }
        peaks = {
            what: {
                str(n): int(2**21 * n / 512 * (3 if what == "backward" else 1) * MEMORY[kind]) for n in SPEED
            }
            for what in COSTS
        }
        for seed in seeds:
            steps = [tokens * (i + 1) // 24 for i in range(24)]
            curve = [[t, bits + 0.01 * seed + 1.9 * math.exp(-4 * t / tokens)] for t in steps]
            cells[f"quality/{name}/{seed}"] = {
                "kind": "quality", "mechanism": name, "seed": seed, "status": "ok", "seconds": 11.0, "bits_per_byte": bits + 0.01 * seed,
                "train_bits_per_byte": bits - 0.2, "tokens": tokens, "curve": curve, "parameters": 300_000,
                "tokens_per_second": 15_000, "baseline": 4.21,
            }  # fmt: skip
            for length, accuracy in zip(recall_lengths, recall, strict=False):
                cells[f"recall/{name}/{length}/{seed}"] = {
                    "kind": "recall", "mechanism": name, "length": length, "seed": seed, "status": "ok", "seconds": 6.0,
                    "accuracy": accuracy, "chance": CHANCE, "questions": 2048, "reach": f"the answer lies at least {length // 2} tokens back",
                }  # fmt: skip
        for what in COSTS:
            for n in SPEED:
                middle = times[what][str(n)]
                cells[f"speed/{name}/{what}/{n}"] = {
                    "kind": "speed", "mechanism": name, "what": what, "length": n, "status": "ok", "seconds": 2.1,
                    "samples_ms": [middle] * 5, "median_ms": middle, "p10_ms": 0.97 * middle, "p90_ms": 1.06 * middle,
                    "peak_bytes": peaks[what][str(n)], "kernel": "sdpa",
                }  # fmt: skip
        summary.append(
            {
                "name": name,
                "bits_per_byte": bits,
                "bits_per_byte_spread": 0.012 if len(seeds) > 1 else None,
                "quality_tie": abs(bits - MADE[0][3] + better) <= 0.02,
                "recall": dict(zip(map(str, recall_lengths), recall, strict=False)),
                **{f"{what}_ms": times[what] for what in COSTS},
                "peak_bytes": peaks,
                "exponent": exponent,
                "faster_from": 512 if exponent < 1.5 else None,
                "status": "ok",
                "error": None,
                "verdict": verdict,
            }
        )
    error = "linformer: a causal form does not exist; use causal(linformer) or performer_favor"
    mechanisms.append(
        {
            "name": "linformer",
            "text": "linformer(64)",
            "title": None,
            "role": "candidate",
            "pattern": None,
        }
    )
    cells["quality/linformer/0"] = {
        "kind": "quality",
        "mechanism": "linformer",
        "seed": 0,
        "status": "failed",
        "error": error,
    }
    summary.append({"name": "linformer", "status": "failed", "error": error})
    return {
        "schema": 1,
        "saccade": "0.1.0",
        "command": "saccade compare --quick",
        "started": "2026-03-02T09:00:00Z",
        "seconds": 83.1,
        "interrupted": False,
        "machine": {"device": "cpu", "name": "AMD EPYC 9B14", "cores": 2, "memory_gib": 23.4, "os": "Linux 6.6", "python": "3.11.7", "torch": "2.13.0+cpu"},
        "settings": {
            "preset": "quick", "seeds": list(seeds), "tokens": tokens, "train_length": 256, "batch": 8, "dim": 96, "depth": 2, "heads": 4,
            "text": TEXT, "text_sha256": "3f9ac1d2" * 8, "recall_lengths": list(recall_lengths), "speed_lengths": list(SPEED),
            "speed_shape": {"batch": 1, "heads": 8, "head_dim": 64},
        },
        "mechanisms": mechanisms,
        "cells": cells,
        "noise": {"bits_per_byte": 0.02, "recall": 0.03, "forward": 0.06, "backward": 0.05, "decode": 0.1},
        "summary": summary,
        "advice": [
            "Use moba from 512 tokens on, and causal below: in this run it keeps the bits per byte of causal and its "
            "forward pass is 5.1x faster at 8,192 tokens.",
            "window(128) is 16x faster at 8,192 tokens, but answers 5% of the recall questions at 320 tokens: use it "
            "where what matters is near.",
        ],
        "caveats": [
            "What a short run cannot tell: local mechanisms learn faster at first, and full attention catches up.",
            "Times hold for this machine, this many threads and this version of torch.",
        ],
        "long_run": None,
    }  # fmt: skip


def with_long_run() -> dict[str, Any]:
    long = document(seeds=(0, 1, 2), tokens=20 * TOKENS, better=0.9, recall_lengths=LONG_RECALL)
    del long["long_run"]
    long["machine"] |= {"device": "cuda", "name": "a data-centre GPU"}
    long["caveats"] = ["Measured on a GPU: its times say nothing about a CPU."]
    return document() | {"long_run": long}


def only(results: dict[str, Any], *names: str) -> dict[str, Any]:
    """The same results for some of the mechanisms."""
    return results | {
        "mechanisms": [m for m in results["mechanisms"] if m["name"] in names],
        "summary": [entry for entry in results["summary"] if entry["name"] in names],
        "cells": {key: cell for key, cell in results["cells"].items() if cell["mechanism"] in names},
    }


def without(results: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same results as an interrupted run leaves them, before it came to cells of one kind."""
    numbers = {
        "quality": ["bits_per_byte", "bits_per_byte_spread", "quality_tie"],
        "recall": ["recall"],
        "speed": ["forward_ms", "backward_ms", "decode_ms", "peak_bytes", "exponent", "faster_from"],
    }[kind]
    return results | {
        "interrupted": True,
        "cells": {key: cell for key, cell in results["cells"].items() if cell["kind"] != kind},
        "summary": [{k: v for k, v in entry.items() if k not in numbers} for entry in results["summary"]],
    }


def all_failed() -> dict[str, Any]:
    results = document()
    error = "RuntimeError: not enough memory: you tried to allocate 64 GiB"
    return results | {
        "cells": {
            key: {**cell, "status": "failed", "error": error} for key, cell in results["cells"].items()
        },
        "summary": [{"name": m["name"], "status": "failed", "error": error} for m in results["mechanisms"]],
        "noise": None,
        "advice": [],
    }


HOSTILE = "<b>x</b></script><img src=x onerror=alert(1)><a href='https://example.org'>%{x}</a> {{ 7 * 7 }}"


def hostile() -> dict[str, Any]:
    """Results in which a name, an error and an advice try to be more than text."""
    results = only(document(), "causal", "moba", "linformer")
    text = json.dumps(results).replace('"moba"', json.dumps(HOSTILE))
    results = json.loads(text)
    results["advice"] = [HOSTILE]
    results["command"] = f"saccade compare {HOSTILE}"
    return results


def crowded() -> dict[str, Any]:
    """Results in which four mechanisms nearly share a place in the quality chart."""
    results = document()
    for i, entry in enumerate(results["summary"][1:4]):
        entry["bits_per_byte"] = 2.92 + 0.004 * i
        entry["backward_ms"] = {"8192": 1540.0 * (1 + 0.02 * i)}
    return results


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "long run": with_long_run,
    "one mechanism": lambda: only(document(), "causal"),
    "crowded": crowded,
    "no speed": lambda: without(document(), "speed"),
    "no quality": lambda: without(document(), "quality"),
    "all failed": all_failed,
    "hostile": hostile,
}


class Page(HTMLParser):
    """What a page says: its rows of cells by table, its addresses, its text and the data of its charts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.data: dict[str, Any] = {}
        self._open = ""
        self._in_cell = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = "data" if ("type", "application/json") in attrs else tag
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")
        ]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag == "small" and self._in_cell:
            self.tables[-1][-1][-1] += " "
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")
        self._open = "" if tag in ("script", "style") else self._open

    def handle_data(self, data: str) -> None:
        if self._open == "data":
            self.data = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        elif self._open not in ("script", "style"):
            self.text += data
            if self._in_cell:
                self.tables[-1][-1][-1] = re.sub(r"\s+", " ", self.tables[-1][-1][-1] + data).lstrip()

    def row(self, name: str, table: int = 0) -> list[str]:
        found = (row for row in self.tables[table] if row[0].split(" full attention")[0] == name)
        return next(found)


def page(results: dict[str, Any], folder: Path) -> Page:
    return Page(report.write(results, folder / "report.html"))


# What it says


def test_write_returns_its_path_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert report.write(with_long_run(), path) == path
    found = Page(path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert found.addresses == ["data:,"]
    assert found.source.count("plotly.js v") == 1


def test_the_table_has_a_row_a_mechanism_and_the_noise_below(tmp_path: Path) -> None:
    found = page(document(), tmp_path)
    assert found.row(REFERENCE)[1:] == ["2.91", "99%", "97%", "492 ms", "1.53 s", "1.97 ms", "154 MiB", "1.95", "\u2013", "the reference"]  # fmt: skip
    assert found.row(TWIN)[1:8] == ["2.92 tie", "98%", "98%", "508 ms tie", "1.57 s tie", "2.03 ms tie", "154 MiB 1.0\u00d7"]  # fmt: skip
    assert found.row(TWIN)[9] == "never up to 8,192"
    assert found.row(WINDOW)[1:5] == ["2.86 \u22120.05", "98%", "5% chance", "31.0 ms 0.063\u00d7"]
    assert found.row(WINDOW)[9] == "512"
    assert found.row("linformer")[1].startswith("Failed: linformer: a causal form does not exist")
    assert found.row("noise")[1:7] == [
        "\u00b1 0.02",
        "\u00b1 3%",
        "\u00b1 3%",
        "\u00b1 6%",
        "\u00b1 5%",
        "\u00b1 10%",
    ]
    assert "Time at 8,192 tokens" in found.tables[0][0]
    assert "at 320 chance 3%" in found.tables[0][1]


def test_times_are_compared_at_the_longest_length_that_all_reached(tmp_path: Path) -> None:
    results = document()
    results["summary"][4]["decode_ms"] = {"512": 0.1, "1024": 0.2}
    heads = page(results, tmp_path).tables[0][0]
    assert "Time at 8,192 tokens" in heads
    assert "Time at 1,024 tokens" in heads


def test_a_partial_mechanism_keeps_its_numbers_and_says_what_failed(tmp_path: Path) -> None:
    results = document()
    results["summary"][3] |= {
        "status": "partial",
        "error": "recall: out of memory",
        "recall": {"64": 0.98, "320": None},
    }
    row = page(results, tmp_path).row("moba")
    assert row[1:4] == ["2.92 tie", "98%", "\u2013"]
    assert row[-1] == "quality tie, loses recall at 320, 5.1x faster at 8,192 recall: out of memory"


def test_spread_over_seeds_and_the_short_run_stand_beside_the_long_one(tmp_path: Path) -> None:
    found = page(with_long_run(), tmp_path)
    assert found.row(WINDOW, table=1)[1:3] == ["2.32 \u00b1 0.01 +0.31", "2.86 \u22120.05"]
    assert "This run, 196,608 tokens, 1 seed" in found.text
    assert "Long run, 3,932,160 tokens, 3 seeds" in found.text
    assert found.text.count("What a short run cannot tell") == 1
    assert "Measured on a GPU" in found.text
    assert {"this-run", "long-run"} < set(found.data["figures"])


def test_without_a_long_run_its_section_is_absent_and_its_caveat_is_kept(tmp_path: Path) -> None:
    found = page(document(), tmp_path)
    assert len(found.tables) == 1
    assert "The long run" not in found.text
    assert found.text.count("What a short run cannot tell") == 1


@pytest.mark.parametrize("interrupted", [True, False])
def test_an_interrupted_run_has_a_banner(tmp_path: Path, interrupted: bool) -> None:
    found = page(document() | {"interrupted": interrupted}, tmp_path)
    assert ("This run was interrupted" in found.text) == interrupted


@pytest.mark.parametrize(
    ("kind", "gone", "line"),
    [
        ("quality", {"quality", "training"}, "No chart: no training curve was recorded."),
        ("recall", {"recall"}, "No chart: recall was not measured."),
        (
            "speed",
            {"quality", *(f"{chart}-{what}" for chart in ("time", "memory") for what in COSTS)},
            "No chart: no time was measured for forward + backward.",
        ),
    ],
)
def test_charts_without_data_are_a_line_that_says_so(
    tmp_path: Path, kind: str, gone: set[str], line: str
) -> None:
    every = set(page(document(), tmp_path).data["figures"])
    found = page(without(document(), kind), tmp_path)
    assert every - set(found.data["figures"]) == gone
    assert line in found.text
    assert found.text.count("No chart:") == len(gone)


def test_unknown_numbers_are_dashes_and_never_reach_a_chart(tmp_path: Path) -> None:
    results = document()
    results["summary"][2] |= {
        "bits_per_byte": math.nan,
        "recall": {"64": None, "320": math.inf},
        "exponent": None,
    }
    results["cells"]["quality/moba/0"]["curve"][3] = [1000, math.nan]
    results["cells"]["quality/causal/0"]["baseline"] = None
    results["noise"] = {"bits_per_byte": None}
    found = page(results, tmp_path)
    assert found.row(WINDOW)[1:4] == ["\u2013"] * 3
    assert [line["name"] for line in found.data["figures"]["quality"]["lines"]] == [REFERENCE, TWIN, "moba", PERFORMER, LINEAR]  # fmt: skip
    curve = next(line for line in found.data["figures"]["training"]["lines"] if line["name"] == "moba")
    assert len(curve["points"]) == 23


def test_a_mechanism_that_has_not_run_yet_says_so(tmp_path: Path) -> None:
    results = document()
    del results["summary"][3]
    results["cells"] = {key: cell for key, cell in results["cells"].items() if cell["mechanism"] != "moba"}
    assert page(results, tmp_path).row("moba")[-1] == "not measured yet"


def test_when_everything_failed_every_row_says_why(tmp_path: Path) -> None:
    found = page(all_failed(), tmp_path)
    assert [row[1] for row in found.tables[0][2:]] == ["Failed: RuntimeError: not enough memory: you tried to allocate 64 GiB"] * 7  # fmt: skip
    assert found.data["figures"] == {}
    assert "too little here to say" in found.text


def test_text_is_escaped(tmp_path: Path) -> None:
    found = page(hostile(), tmp_path)
    assert "img" not in found.tags
    assert "a" not in found.tags
    assert found.addresses == ["data:,"]
    assert found.text.count(HOSTILE) >= 5
    assert HOSTILE not in found.source
    assert HOSTILE in found.data["styles"]


def test_styles_are_black_for_the_reference_grey_for_the_twin_and_apart_for_the_rest(tmp_path: Path) -> None:
    results = with_long_run()
    results["long_run"]["mechanisms"].reverse()
    for i in range(12):
        results["long_run"]["mechanisms"].append({"name": f"more{i}", "text": "causal", "role": "candidate"})
    styles = page(results, tmp_path).data["styles"]
    assert styles[REFERENCE] == {"color": "--reference", "dash": "solid", "symbol": "circle"}
    assert styles[TWIN] == {"color": "--twin", "dash": "dash", "symbol": "circle-open"}
    assert len({tuple(style.values()) for style in styles.values()}) == len(styles) == 19


def test_patterns_are_drawn_square_by_square(tmp_path: Path) -> None:
    results = document()
    results["mechanisms"][2]["pattern"] = [[1, 0, 0], [0.5, -0.25, None]]
    results["mechanisms"][2]["pattern_kind"] = "weights"
    found = page(results, tmp_path)
    assert 'aria-label="window(128): 2 queries by 3 keys, 3 pairs read"' in found.source
    assert '<path opacity="0.5" d="M1 1h1v1h-1z"/>' in found.source
    assert '<path opacity="1.0" d="M0 0h1v1h-1zM0 1h1v1h-1z"/>' in found.source
    assert found.text.count("no picture") == 1


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (words.ms_text(0.03214), "0.0321 ms"),
        (words.ms_text(4.6), "4.60 ms"),
        (words.ms_text(999.6), "1.00 s"),
        (words.ms_text(61_234), "61.2 s"),
        (words.bytes_text(0), "0.00 B"),
        (words.bytes_text(1023), "1,020 B"),
        (words.bytes_text(12_345_678), "11.8 MiB"),
        (words.bytes_text(5 * 2**40), "5.00 TiB"),
        (words.significant(9.999), "10.0"),
        (words.duration(59.6), "1 min 0 s"),
        (words.duration(7_260), "2 h 1 min"),
    ],
)
def test_numbers_are_for_people(shown: str, wanted: str) -> None:
    assert shown == wanted


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"schema 2 .*--fresh"):
        report.write(document() | {"schema": 2}, tmp_path / "report.html")
    with pytest.raises(ValueError, match="schema None"):
        report.write(document() | {"long_run": {"mechanisms": []}}, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        report.write(document(), tmp_path / "absent" / "report.html")


# What a browser makes of it

MARKS = """Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) =>
    [chart.id, [...chart.querySelectorAll('.scatterlayer .trace')].map((trace) =>
        [...trace.querySelectorAll('path.point, path.js-line')].filter((path) => path.getAttribute('d').length > 4).length)]))"""
OVERLAPS = """[...document.querySelectorAll('.chart')].flatMap((chart) => ['.xtick text', '.ytick text', '.textpoint text'].flatMap((kind) => {
    const boxes = [...chart.querySelectorAll(kind)].map((text) => [text.textContent, text.getBoundingClientRect()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
        .filter(([, q]) => p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom)
        .map(([b]) => `${chart.id}: ${a} on ${b}`));
}))"""
OUTSIDE = """[...document.querySelectorAll('main > *, figure, .chart text, .key button, pre, p, dd, h1, h2, h3')].filter((node) => {
    const box = node.getBoundingClientRect();
    return box.width && (box.left < -0.5 || box.right > innerWidth + 0.5);
}).map((node) => node.outerHTML.slice(0, 80))"""
FITS = "[...document.querySelectorAll('.scroll')].every((box) => box.scrollWidth <= box.clientWidth)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not INSTALLED:
        pytest.skip(MISSING)
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", PAGES)
def test_the_page_is_sound_in_a_browser(chromium: Browser, tmp_path: Path, kind: str, width: int) -> None:
    path = report.write(PAGES[kind](), tmp_path / "report.html")
    figures = Page(path).data["figures"]
    chromium.show(path, width)
    assert chromium.errors() == []
    assert chromium.requests() == [path.as_uri()]
    marks = chromium.ask(MARKS)
    assert set(marks) == set(figures)
    for name, figure in figures.items():
        drawn = len(figure["lines"]) + bool(figure.get("guide", {}).get("points"))
        assert len(marks[name]) == drawn, name
        assert all(marks[name]), name
    assert chromium.ask("innerWidth") == width
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    assert chromium.ask(OUTSIDE) == []
    assert chromium.ask(OVERLAPS) == []
    assert chromium.ask(FITS) or width == 400 or kind == "hostile"


def test_a_hostile_name_is_shown_letter_for_letter(chromium: Browser, tmp_path: Path) -> None:
    chromium.show(report.write(hostile(), tmp_path / "report.html"), 1280)
    assert chromium.ask("document.querySelectorAll('main img, main a').length") == 0
    shown = chromium.ask(
        "[...document.querySelectorAll('#quality .textpoint')].map((text) => text.textContent)"
    )
    assert shown == ["causal", HOSTILE[:33] + "\u2026"]
    chromium.ask("Plotly.Fx.hover('time-forward', [{curveNumber: 1, pointNumber: 4}])")
    told = chromium.ask("document.querySelector('#time-forward .hoverlayer').textContent")
    assert told == f"{HOSTILE}8,192 tokens: 96.0 ms (93.1 ms to 102 ms)"


def test_a_key_hides_its_mechanism_in_every_chart_and_brings_it_back(
    chromium: Browser, tmp_path: Path
) -> None:
    chromium.show(report.write(with_long_run(), tmp_path / "report.html"), 1280)
    traces = (
        "[...document.querySelectorAll('.chart')].map((chart) => chart.querySelectorAll('.trace').length)"
    )
    press = "[...document.querySelectorAll('.key button')].find((key) => key.dataset.name === 'moba').click()"
    before = chromium.ask(traces)
    chromium.ask(press)
    assert chromium.ask(traces) == [count - 1 for count in before]
    assert chromium.ask("document.querySelectorAll('.key [aria-pressed=false]').length") == 5
    chromium.ask(press)
    assert chromium.ask(traces) == before
    assert chromium.errors() == []


@pytest.mark.parametrize(("dark", "ink"), [(False, "rgb(0, 0, 0)"), (True, "rgb(255, 255, 255)")])
def test_the_reference_stands_out_in_light_and_dark(
    chromium: Browser, tmp_path: Path, dark: bool, ink: str
) -> None:
    chromium.show(report.write(only(document(), "causal"), tmp_path / "report.html"), 1280, dark=dark)
    lines = "[...document.querySelectorAll('#time-forward path.js-line')].map((line) => line.style.stroke)"
    assert chromium.ask(lines) == [ink]
    paper = [
        int(c) for c in re.findall(r"\d+", chromium.ask("getComputedStyle(document.body).backgroundColor"))
    ]
    assert (sum(paper) < 200) == dark
