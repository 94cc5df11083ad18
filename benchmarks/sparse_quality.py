"""Choices of keys beside full attention and a window of the same budget; writes results/sparse_quality.json.

    python benchmarks/sparse_quality.py

A small model learns recall and needles with full attention, three seeds each, and is frozen; every choice is then put in its
place. Accuracy and the share of the full attention's weight that the choice keeps, both at asking positions, for two
budgets; time of attention alone at 8,192 tokens for the same shares, over full causal attention.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn

import saccade as sc
from bars import FOLDER, paired, qkv
from saccade.bench.machine import describe
from saccade.bench.train import NearbyEmbedding, fit, short_then_all
from saccade.nn import Transformer
from saccade.systems.seerattention import gate_loss
from saccade.tasks.needle import Needle
from saccade.tasks.recall import SILENT, Recall, accuracy

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
        f"causal + hyperattention({n // 4}, samples={n // 4}, base={n // 2})"
    ),
    "best single keys": lambda n, block: f"causal + top_keys({n})",
}


def model(task: Task, text: str, seed: int) -> Transformer:
    """A fresh model with two layers; a short convolution stands in for the nearest context."""
    torch.manual_seed(seed)
    made = Transformer(task.vocab, dim=64, depth=2, heads=2, mechanism=text, max_length=LENGTH)
    made.embedding = NearbyEmbedding(task.vocab, 64, LENGTH)
    return made


def teacher(name: str, seed: int) -> tuple[Transformer, Task]:
    """A model that learned a task with full attention, and the task."""
    g = torch.Generator().manual_seed(seed)
    task: Task
    if name == "recall":
        tasks = [Recall(n, 16, 32, 32, 32) for n in (64, LENGTH)]
        task, steps = tasks[-1], 500
        batches = ((t, t.batch(4096 // t.length, g, pairs)) for t, pairs in short_then_all(tasks, steps))
    else:
        needles = [Needle(n, needles=4, queries=16, keys=8, values=8) for n in (64, LENGTH)]
        task, steps = needles[-1], 500
        turns = [needles[0 if step < 2 * steps // 3 else step % 2] for step in range(steps)]
        batches = ((t, t.batch(4096 // t.length, g)) for t in turns)
    made = model(task, "causal", seed)
    fit(made, (pair for _, pair in batches), steps, 2e-3)
    return made.eval(), task


def swapped(frozen: Transformer, task: Task, text: str, seed: int) -> Transformer:
    """The frozen model with another mechanism; a gate is taught on batches of its own."""
    made = model(task, text, seed)
    made.load_state_dict(frozen.state_dict(), strict=False)
    gates = [p for n, p in made.named_parameters() if "gate" in n]
    if gates:
        g, optimizer = torch.Generator().manual_seed(seed + 100), torch.optim.Adam(gates, lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            gate_loss(frozen, made, task.batch(8, g)[0]).backward()
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


def times(share: float) -> dict[str, float]:
    """Time of each mechanism at 8,192 tokens over that of full causal attention, forward."""
    q, k, v = qkv(LONG)
    found = {}
    for name, text in SYSTEMS.items():
        m = sc.mechanism(text(round(share * LONG), LONG_BLOCK))
        sizes = sc.parts.base.Sizes(8, 8, 64, 64)
        params = {n: w.make(torch.Generator().manual_seed(0)) for n, w in m.weights(sizes).items()}
        buffers = m.buffers(sizes, torch.Generator().manual_seed(0))
        with torch.no_grad():
            mine, full = paired(
                lambda m=m, params=params, buffers=buffers: sc.attend(
                    q, k, v, m, params=params, buffers=buffers
                ),
                lambda: sc.attend(q, k, v, "causal"),
                3,
            )
        found[name] = statistics.median(a / b for a, b in zip(mine, full, strict=True))
    return found


def main() -> None:
    console, rows = Console(), []
    for name in ("recall", "needle"):
        for seed in SEEDS:
            frozen, task = teacher(name, seed)
            tokens, targets = task.batch(32, torch.Generator().manual_seed(1000 + seed))
            for share in SHARES:
                for system, text in SYSTEMS.items():
                    said = text(round(share * LENGTH), BLOCK)
                    found = judged(frozen, swapped(frozen, task, said, seed), tokens, targets)
                    rows.append(
                        {"task": name, "seed": seed, "share": share, "system": system, "text": said, **found}
                    )
                    console.print(rows[-1])
    with console.status("times"):
        spent = {str(share): times(share) for share in SHARES}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    document = {
        "made_by": "python benchmarks/sparse_quality.py",
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": describe("cpu"),
        "length": LENGTH,
        "rows": rows,
        "time_over_full_at_8192": spent,
    }
    (FOLDER / "sparse_quality.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
