"""Choices of keys beside full attention and a window of the same budget; writes results/sparse_quality.json.

    python benchmarks/sparse_quality.py [--device cuda] [--processes 6] [--steps 500] [--seconds 420]

A small model learns recall and needles with full attention, three seeds each, and is frozen; every choice is then put in its
place. Accuracy and the share of the full attention's weight that the choice keeps, both at asking positions, for two budgets.
Time is that of attention alone at 8,192 tokens for the same shares, over full causal attention, first and with nothing beside it:
float32 on a CPU, bfloat16 on a GPU. Every finished model is written at once, and the next call goes on from there. A whole run writes
its table into docs/selection.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import saccade as sc
from bars import FOLDER, HEAD_DIM, HEADS, paired, qkv
from book import DOCS, Book, put_section
from saccade.bench.machine import describe, require
from saccade.bench.train import NearbyEmbedding, fit, short_then_all
from saccade.mechanism import draw_named
from saccade.nn import Transformer
from saccade.parts.base import Sizes
from saccade.systems.seerattention import gate_loss
from saccade.tasks.needle import Needle
from saccade.tasks.recall import SILENT, Recall, accuracy
from side_by_side import card, each, synchronize

LENGTH, BLOCK, SHARES, SEEDS = 256, 16, (0.125, 0.25), (0, 1, 2)
LONG, LONG_BLOCK = 8192, 64

Task = Recall | Needle

SYSTEMS: dict[str, Callable[[int, int], str]] = {
    "full attention": lambda n, block: "causal",
    "window": lambda n, block: f"window({n})",
    "window and sinks": lambda n, block: f"causal + window({n - 4}) + sink(4)",
    "MoBA (S211)": lambda n, block: f"moba({block}, top={n // block - 1})",
    "blocks by bound (Quest)": lambda n, block: (
        f"causal + top_blocks({block}, top={n // block - 1}, proxy=bound_key) + chunk({block})"
    ),
    "blocks by their true mass (as S285)": lambda n, block: (
        f"causal + top_blocks({block}, top={n // block - 1}, proxy=block_mass) + chunk({block})"
    ),
    "SeerAttention (S265)": lambda n, block: f"seerattention({block}, top={n // block - 1}, rope=false)",
    "HyperAttention (S235)": lambda n, block: (
        f"causal + hyperattention({n // 8}, samples={n // 8}, base={n // 2})"
    ),
    "best single keys": lambda n, block: f"causal + top_keys({n})",
}


def model(task: Task, text: str, seed: int) -> Transformer:
    """A fresh model with two layers; a short convolution stands in for the nearest context."""
    torch.manual_seed(seed)
    made = Transformer(task.vocab, dim=64, depth=2, heads=2, mechanism=text, max_length=LENGTH)
    made.embedding = NearbyEmbedding(task.vocab, 64, LENGTH)
    return made


def teacher(name: str, seed: int, steps: int, device: str) -> tuple[Transformer, Task]:
    """A model that learned a task with full attention, and the task."""
    g = torch.Generator().manual_seed(seed)
    task: Task
    if name == "recall":
        tasks = [Recall(n, 16, 32, 32, 32) for n in (64, LENGTH)]
        task = tasks[-1]
        batches = (t.batch(4096 // t.length, g, pairs) for t, pairs in short_then_all(tasks, steps))
    else:
        needles = [Needle(n, needles=4, queries=16, keys=8, values=8) for n in (64, LENGTH)]
        task = needles[-1]
        turns = [needles[0 if step < 2 * steps // 3 else step % 2] for step in range(steps)]
        batches = (t.batch(4096 // t.length, g) for t in turns)
    made = model(task, "causal", seed).to(device)
    fit(made, ((x.to(device), y.to(device)) for x, y in batches), steps, 2e-3)
    return made.eval(), task


def swapped(frozen: Transformer, task: Task, text: str, seed: int, steps: int, device: str) -> Transformer:
    """The frozen model with another mechanism; a gate is taught on batches of its own."""
    made = model(task, text, seed).to(device)
    made.load_state_dict(frozen.state_dict(), strict=False)
    gates = [p for n, p in made.named_parameters() if ".gate_" in n]
    if gates:
        g, optimizer = torch.Generator().manual_seed(seed + 100), torch.optim.Adam(gates, lr=3e-3)
        for _ in range(3 * steps // 10):
            optimizer.zero_grad()
            gate_loss(frozen, made, task.batch(8, g)[0].to(device)).backward()
            optimizer.step()
    return made.eval()


@torch.no_grad()
def judged(frozen: Transformer, made: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy, and the kept share of the full weights and of the pairs, at asking positions."""
    assert isinstance(made, Transformer)
    asked, x = targets != SILENT, frozen.embedding(tokens)
    mass, pairs = [], []
    for own, other in zip(frozen.blocks, made.blocks, strict=True):
        seen = own.norm1(x)
        full, kept = (
            b.attention(seen, need=("weights",)).weights.transpose(1, 2)[asked] for b in (own, other)
        )
        mass.append(float((full * (kept > 0)).sum(-1).mean()))
        pairs.append(float((kept > 0).float().sum(-1).mean()))
        x = own(x)
    return {
        "accuracy": accuracy(made(tokens), targets),
        "mass": statistics.mean(mass),
        "keys": statistics.mean(pairs),
    }


def studied(job: tuple[str, int, int, str]) -> list[dict[str, Any]]:
    """Every system at every budget in the place of one teacher's attention, or why there is no such row."""
    name, seed, steps, device = job
    device = card(device)
    torch.set_num_threads(1)
    frozen, task = teacher(name, seed, steps, device)
    tokens, targets = (x.to(device) for x in task.batch(32, torch.Generator().manual_seed(1000 + seed)))
    rows = []
    for share in SHARES:
        for system, text in SYSTEMS.items():
            said = text(round(share * LENGTH), BLOCK)
            row: dict[str, Any] = {
                "task": name,
                "seed": seed,
                "share": share,
                "system": system,
                "text": said,
            }
            try:
                made = swapped(frozen, task, said, seed, steps, device)
                row |= judged(frozen, made, tokens, targets)
            except Exception:
                row["error"] = traceback.format_exc(limit=-1).strip().splitlines()[-1]
            rows.append(row)
    return rows


def timed(system: str, share: float, device: str) -> dict[str, Any]:
    """Time of a system at 8,192 tokens over that of full causal attention, forward."""
    m = sc.mechanism(SYSTEMS[system](round(share * LONG), LONG_BLOCK))
    row: dict[str, Any] = {"system": system, "share": share, "text": str(m)}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (x.to(device, dtype) for x in qkv(LONG))
    named = draw_named(
        m, Sizes(HEADS, HEADS, HEAD_DIM, HEAD_DIM), 1, LONG, torch.Generator().manual_seed(0), device=device
    )

    def call(mechanism: sc.Mechanism | str, **given: Any) -> Callable[[], object]:
        def once() -> None:
            sc.attend(q, k, v, mechanism, **given)
            synchronize(device)

        return once

    try:
        with torch.no_grad():
            mine, full = paired(call(m, **named), call("causal"), 3 if device == "cpu" else 9)
        row |= {"over_full": statistics.median(a / b for a, b in zip(mine, full, strict=True))}
        row |= {"ms": 1e3 * statistics.median(mine), "full_ms": 1e3 * statistics.median(full)}
        row["kernel"] = sc.plan(m, (1, HEADS, LONG, HEAD_DIM), device=device, dtype=dtype).kernel
    except Exception:
        row["error"] = traceback.format_exc(limit=-1).strip().splitlines()[-1]
    return row


def table(document: dict[str, Any]) -> str:
    """The results in markdown: a row a system and a budget, means over seeds."""
    lines = [
        "| system | budget | keys read | recall | needle | mass, recall | mass, needle | time over full |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for share in SHARES:
        for system in SYSTEMS:
            if system == "full attention" and share != SHARES[0]:
                continue
            own = [r for r in document["rows"] if (r["system"], r["share"]) == (system, share)]
            means = []
            for what, name in (
                ("accuracy", "recall"),
                ("accuracy", "needle"),
                ("mass", "recall"),
                ("mass", "needle"),
            ):
                found = [r[what] for r in own if r["task"] == name and what in r]
                means.append(f"{statistics.mean(found):.2f}" if found else "-")
            spent: dict[str, Any] = next(
                (r for r in document["times"] if (r["system"], r["share"]) == (system, share)), {}
            )
            over = f"{spent['over_full']:.2f}" if "over_full" in spent else "-"
            budget = "all" if system == "full attention" else f"{round(share * LENGTH)}"
            read = [r["keys"] for r in own if "keys" in r]
            keys = f"{statistics.mean(read):.0f}" if read else "-"
            lines.append(f"| {system} | {budget} | {keys} | {' | '.join(means)} | {over} |")
    return "\n".join(lines)


def section(document: dict[str, Any]) -> str:
    """What docs/selection.md says of a run."""
    return f"""
`benchmarks/sparse_quality.py` (`results/sparse_quality.json`, one {document["machine"]["name"]}, commit {document["commit"]}):
a model of two layers learns recall of 16 pairs, or finds 4 needles, over {LENGTH} tokens with full attention and is frozen; then
each choice of keys takes the place of its attention. The budget counts the own block whole; *keys read* is the mean where something
is asked, *mass* the share of the full attention's weight on them. Gates are taught on the frozen model. Means of {len(SEEDS)} seeds.
Time is one forward call over {LONG:,} tokens with the same share of keys in blocks of {LONG_BLOCK}, over full causal attention.

{table(document)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda (all cards) or cuda:N")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500, help="of the teacher's training; fewer for a trial")
    parser.add_argument("--only", default="", help="one task, recall or needle; docs are not written")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no model after so long")
    parser.add_argument("--out", type=Path, default=FOLDER / "sparse_quality.json")
    parser.add_argument(
        "--table", action="store_true", help="print the table of what is known and measure nothing"
    )
    options = parser.parse_args()
    require(options.device)
    settings = {"length": LENGTH, "block": BLOCK, "shares": SHARES, "steps": options.steps, "long": LONG}
    keys = {"rows": ("task", "seed", "share", "system"), "times": ("system", "share")}
    book = Book(options.out, "python benchmarks/sparse_quality.py", settings, keys)
    console, end = Console(), time.monotonic() + options.seconds
    if options.table:
        print(table(book.document))
        return 0
    first = "cuda:0" if options.device == "cuda" else options.device
    machine = describe(first)
    for share in SHARES:
        for system in SYSTEMS:
            if not book.has("times", system=system, share=share, on=machine["name"]):
                row = {"on": machine["name"], **timed(system, share, first)}
                book.add("times", row, machine)
                console.print(row, markup=False)
    jobs = [
        (name, seed, options.steps, options.device)
        for seed in SEEDS
        for name in ("recall", "needle")
        if options.only in name
        and not all(
            book.has("rows", task=name, seed=seed, share=share, system=system)
            for share in SHARES
            for system in SYSTEMS
        )
    ]
    done = 0
    for rows in each(studied, jobs, options.processes, end):
        done += 1
        for row in rows:
            book.add("rows", row, machine)
        console.print(f"{done}/{len(jobs)}", *rows, sep="\n", markup=False)
    if done < len(jobs):
        console.print(f"time is up: {len(jobs) - done} models are left for another call")
    elif not options.only and options.out == FOLDER / "sparse_quality.json":
        put_section(DOCS / "selection.md", "Quality for a budget", section(book.document), before="Systems")
    console.print(f"written to {options.out}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
