"""Recall against the size of the state, for many mechanisms; writes results/recall_state.json and docs/recall_state.svg.

    python benchmarks/recall_state.py [--device cuda] [--processes 24] [--only WORD] [--seconds 420] [--draw]

A model of two blocks behind a short convolution learns to recall 32 of 64 pairs over 256 tokens. All models are 64 channels wide;
the state of a layer changes with the number of heads (the fewer, the larger each square), the window or the features. What it
holds is counted for one sample of 256 tokens in float32. Each layer is first timed alone, forward over 8,192 tokens and token by
token after them; then models are trained side by side, `--processes` at a time, spread over the cards. Every finished cell is
written at once, and the next call goes on from there; `--draw` only draws what there is. A CPU works on one thread a process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import saccade as sc
from bars import FOLDER
from book import DOCS, Book, put_section
from chart import Curve, chart
from saccade.bench.machine import describe, require
from saccade.bench.train import NearbyEmbedding, fit, short_then_all
from saccade.mechanism import Combine, Mechanism, Mixer, Pairwise
from saccade.tasks.recall import Recall, accuracy
from side_by_side import card, each, synchronize

DIM, DEPTH, LENGTHS, PAIRS, LETTERS, QUERIES = 64, 2, (96, 256), 32, 64, 32
STEPS, TOKENS, RATE, SEEDS = 1200, 8192, 3e-3, (0, 1)
TIMED, PARALLEL = 8192, 16

Cell = tuple[str, int]  # a mechanism's text and the heads of a layer


def by_heads(text: str, heads: Sequence[int] = (8, 4, 2, 1)) -> tuple[Cell, ...]:
    """The same mechanism with its channels in more or fewer heads."""
    return tuple((text, h) for h in heads)


CURVES: dict[str, tuple[Cell, ...]] = {
    "full attention": by_heads("causal", (2,)),
    "window": tuple((f"window({w})", 2) for w in (16, 32, 64, 128, 192)),
    "linear, elu + 1": by_heads("causal + linear"),
    "Performer": tuple((f"causal + performer_favor({m})", 2) for m in (16, 32, 64, 128)),
    "Hedgehog": by_heads("causal + hedgehog"),
    "retention": by_heads("retention"),
    "GLA": by_heads("gla"),
    "Mamba-2": by_heads("mamba2"),
    "delta rule": by_heads("delta_net"),
    "gated delta rule": by_heads("gated_delta_net"),
    "linear and window(32)": by_heads("mix(causal + linear, window(32))"),
    "Based": by_heads("based", (8, 4, 2)),
    "Taylor and window(32)": by_heads("mix(causal + taylor + ratio, window(32))", (8, 4, 2)),
    "Fastmax": by_heads("causal + fastmax", (8, 4, 2)),
    "LLN": by_heads("lln_attention(causal=true)"),
    "Lightning": by_heads("lightning_attention_tnl"),
    "Transformer-VQ": tuple((f"transformer_vq({n}, block=32)", 2) for n in (16, 32, 64)),
    "Combiner": tuple((f"combiner({n})", 2) for n in (16, 32)),
    "Hymba": by_heads("hymba", (8, 4, 2)),
}
KEYS = {"cells": ("text", "heads", "seed"), "layers": ("text", "heads")}


def book_at(path: Path, steps: int) -> Book:
    """The results in a file, for so many steps of training."""
    settings = {"dim": DIM, "depth": DEPTH, "lengths": LENGTHS, "pairs": PAIRS, "letters": LETTERS}
    settings |= {"queries": QUERIES, "steps": steps, "tokens": TOKENS, "rate": RATE}
    return Book(path, "python benchmarks/recall_state.py", settings, KEYS)


def cells(console: Console, word: str) -> dict[str, list[Cell]]:
    """The curves whose name holds a word, without cells that name no mechanism that decodes here; says which are left out."""
    found: dict[str, list[Cell]] = {}
    said: set[str] = set()
    for name, asked in CURVES.items():
        if word.lower() not in name.lower():
            continue
        for text, heads in asked:
            try:
                held(sc.causal(sc.mechanism(text)), heads)
            except ValueError as error:
                if text not in said:
                    console.print(f"left out: {text} ({name}): {str(error).splitlines()[0]}", markup=False)
                said.add(text)
                continue
            found.setdefault(name, []).append((text, heads))
    return found


@torch.no_grad()
def held(m: Mechanism, heads: int) -> int:
    """Bytes that a layer keeps of one text of the greatest length, in float32; of a window's keys those still to be read."""
    layer = sc.nn.Attention(DIM, heads, m).eval()
    return counted(m, layer.step(torch.zeros(1, LENGTHS[-1], DIM), layer.init_state(1))[1])


def counted(m: Mechanism, state: sc.State) -> int:
    """Bytes of a state without the room that it keeps beyond its horizon."""
    if isinstance(m, Combine):
        return sum(counted(c, s) for c, s in zip(m.children, state.members, strict=True))
    horizon = m.horizon if isinstance(m, Mixer) else None
    if isinstance(m, Pairwise) and m.static:
        horizon = m.pairs.horizon
    if horizon is None:
        return state.nbytes
    return round(state.nbytes * min(1.0, horizon / (state.length - state.start)))


def model(text: str, heads: int, seed: int) -> sc.nn.Transformer:
    """A fresh model; a short convolution stands in for the nearest context."""
    torch.manual_seed(seed)
    made = sc.nn.Transformer(tasks()[-1].vocab, DIM, DEPTH, heads, text, LENGTHS[-1])
    made.embedding = NearbyEmbedding(tasks()[-1].vocab, DIM, LENGTHS[-1])
    return made


def tasks() -> list[Recall]:
    """Recall at every length, the shortest first."""
    return [Recall(n, PAIRS, QUERIES, LETTERS, LETTERS) for n in LENGTHS]


def learned(job: tuple[str, int, int, str, int]) -> dict[str, Any]:
    """A trained cell's accuracy at the greatest length, or why there is none; `steps` of the full training."""
    text, heads, seed, device, steps = job
    torch.set_num_threads(1)
    device = card(device)
    row: dict[str, Any] = {"text": text, "heads": heads, "seed": seed}
    start = time.perf_counter()
    try:
        made = model(text, heads, seed).to(device)
        fit(made, batches(seed, device, steps), steps, RATE)
        made.eval()
        task = tasks()[-1]
        tokens, targets = task.batch(64, torch.Generator().manual_seed(2**32 + seed))
        with torch.no_grad():
            row["accuracy"] = accuracy(made(tokens.to(device)).cpu(), targets)
    except Exception:
        row["error"] = traceback.format_exc(limit=-1).strip().splitlines()[-1]
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def batches(seed: int, device: str, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Questions and answers, easy ones first."""
    generator = torch.Generator().manual_seed(seed)
    for task, pairs in short_then_all(tasks(), steps):
        tokens, targets = task.batch(TOKENS // task.length, generator, pairs)
        yield tokens.to(device), targets.to(device)


def speed(text: str, heads: int, device: str) -> dict[str, Any]:
    """A layer's state in bytes, its planned FLOPs a token, and tokens a second forward and decoding `PARALLEL` texts."""
    m = sc.causal(sc.mechanism(text))
    row: dict[str, Any] = {"text": text, "heads": heads, "state_bytes": held(m, heads)}
    try:
        row["flops_a_token"] = sc.plan(m, (1, heads, TIMED, DIM // heads), device=device).cost.flops / TIMED
        layer = sc.nn.Attention(DIM, heads, m).to(device).eval()
        past = torch.randn(PARALLEL, TIMED, DIM, device=device)
        new = torch.randn(PARALLEL, 1, DIM, device=device)
        with torch.no_grad():
            row["forward_tokens_a_second"] = TIMED / median(lambda: layer(past[:1]), device)
            _, state = layer.step(past, layer.init_state(PARALLEL))
            row["decode_tokens_a_second"] = PARALLEL / median(lambda: layer.step(new, state), device)
    except Exception:
        row["error"] = traceback.format_exc(limit=-1).strip().splitlines()[-1]
    return row


def median(call: Callable[[], object], device: str, budget: float = 0.4) -> float:
    """Seconds of a call: the median of at least three and of as many as fit into the budget, after two."""

    def once() -> float:
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    once(), once()
    found: list[float] = []
    while len(found) < 3 or sum(found) < budget:
        found.append(once())
    return statistics.median(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda (all cards) or cuda:N")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", default="", help="curves whose name holds this word")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer for a trial")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no cell after so long")
    parser.add_argument("--out", type=Path, default=FOLDER / "recall_state.json")
    parser.add_argument("--draw", action="store_true", help="draw what is known and measure nothing")
    options = parser.parse_args()
    require(options.device)
    torch.set_num_threads(1)
    console, book = Console(), book_at(options.out, options.steps)
    if not options.draw:
        asked, end = cells(console, options.only), time.monotonic() + options.seconds
        time_layers(book, asked, options.device, console)
        train(book, asked, options, end, console)
    own = options.out == FOLDER / "recall_state.json"
    picture = DOCS / "recall_state.svg" if own else options.out.with_suffix(".svg")
    picture.write_text(drawn(book.document), encoding="utf-8")
    if own:
        put_section(DOCS / "decoding.md", "Recall against the size of a state", section(book.document))
    console.print(f"written to {options.out} and {picture}", markup=False)
    return 0


def time_layers(book: Book, asked: dict[str, list[Cell]], device: str, console: Console) -> None:
    """The state and the speed of every layer that was not timed on this machine."""
    first = "cuda:0" if device == "cuda" else device
    machine = describe(first)
    for name, found in asked.items():
        for text, heads in found:
            if not book.has("layers", text=text, heads=heads, on=machine["name"]):
                row = {"curve": name, "on": machine["name"], **speed(text, heads, first)}
                book.add("layers", row, machine)
                console.print(row, markup=False)


def train(
    book: Book, asked: dict[str, list[Cell]], options: argparse.Namespace, end: float, console: Console
) -> None:
    """Every cell that is not known, until the time is up."""
    curves = {cell: name for name, found in asked.items() for cell in found}
    jobs = [
        (text, heads, seed, options.device, options.steps)
        for seed in SEEDS
        for text, heads in curves
        if not book.has("cells", text=text, heads=heads, seed=seed)
    ]
    machine = describe("cuda:0" if options.device == "cuda" else options.device)
    done = 0
    for row in each(learned, jobs, options.processes, end):
        row = {"curve": curves[row["text"], row["heads"]], "on": machine["name"], **row}
        book.add("cells", row, machine)
        done += 1
        console.print(f"{done}/{len(jobs)}", row, markup=False)
    if done < len(jobs):
        console.print(f"time is up: {len(jobs) - done} cells are left for another call")


def drawn(document: dict[str, Any]) -> str:
    """The figure: accuracy against the bytes of a layer's state, and against tokens a second in decoding."""
    by_state, by_speed = [], []
    for name in CURVES:
        points = []
        for layer in (r for r in document["layers"] if r["curve"] == name):
            found = [
                r["accuracy"]
                for r in document["cells"]
                if (r["text"], r["heads"]) == (layer["text"], layer["heads"]) and "accuracy" in r
            ]
            if found:
                points.append((layer, max(found), min(found)))
        if points:
            by_state.append(Curve(name, [(p["state_bytes"] / 1024, hi, lo) for p, hi, lo in points]))
            rate = "decode_tokens_a_second"
            by_speed.append(Curve(name, [(p[rate], hi, lo) for p, hi, lo in points if rate in p]))
    seeds = len({r["seed"] for r in document["cells"]})
    said = f"recall of {PAIRS} pairs over {LENGTHS[-1]} tokens" + (
        f"; the best of {seeds} seeds, bars down to the worst" if seeds > 1 else ", one seed"
    )
    return chart(
        said,
        [
            ("state of a layer, KiB", by_state),
            (f"tokens a second of a layer, decoding {PARALLEL} texts of {TIMED:,}", by_speed),
        ],
    )


def section(document: dict[str, Any]) -> str:
    """What docs/decoding.md says of the run."""
    return f"""
A state of fixed size holds so much. `benchmarks/recall_state.py` trains small models, {DEPTH} blocks of {DIM} channels behind a
short convolution, to recall {PAIRS} pairs over {LENGTHS[-1]} tokens; the answer lies at least {tasks()[-1].beyond} tokens back. The state of a
layer changes with the number of heads, the window or the features; it is counted in float32 for one text. On the right the
same models by how fast a layer decodes on one {document["machine"]["name"]} (`results/recall_state.json`). One learning rate serves all, so a point
says what was learned in {document["settings"]["steps"]:,} steps, not what could be.

![Recall against the size of the state, and against the speed of decoding](recall_state.svg)
"""


if __name__ == "__main__":
    sys.exit(main())
