"""Quality and recall cells: a small model is trained from scratch and scored on what it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import Embedding
from saccade.tasks import text
from saccade.tasks.recall import SILENT, Recall, accuracy

NEARBY = 3
_BITS = 1 / math.log(2)
_CURVE_POINTS = 24
_HELDOUT_TOKENS = 8192  # scored at once
_QUESTIONS = 2048


def quality(job: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte on held-out text after a budget of training tokens."""
    s, device = job["settings"], job["device"]
    path = job["corpus"]["path"]
    corpus = text.load(Path(path) if path else None, window=s["length"])
    if corpus.sha256 != job["corpus"]["sha256"]:
        raise ValueError(f"{corpus.name} changed while the comparison ran: start it again")
    model = _model(job, text.VOCAB, s["length"])
    generator = torch.Generator().manual_seed(job["seed"])
    steps = max(1, s["tokens"] // (s["batch"] * s["length"]))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            rows = corpus.batch(s["batch"], s["length"], generator).to(device)
            yield rows[:, :-1], rows[:, 1:]

    start = time.perf_counter()
    losses = fit(model, batches(), steps, s["learning_rate"])
    seconds = time.perf_counter() - start
    trained = steps * s["batch"] * s["length"]
    per_window = _heldout_bits(model, corpus.windows(s["length"]), device)
    curve = _curve(losses, trained // steps)
    return {
        f"quality/{job['mechanism']}/{job['seed']}": {
            "bits_per_byte": float(per_window.mean()),
            "train_bits_per_byte": curve[-1][1],
            "window_bits": [round(b, 4) for b in per_window.tolist()],
            "tokens": trained,
            "tokens_per_second": round(trained / seconds),
            "curve": curve,
            "parameters": sum(p.numel() for p in model.parameters()),
            "baseline": corpus.baseline(s["length"]),
        }
    }


def recall(job: dict[str, Any]) -> dict[str, Any]:
    """Accuracy at each length of one model that was trained on all of them."""
    s, device = job["settings"], job["device"]
    tasks = [Recall(n, s["pairs"], s["queries"], s["keys"], s["values"]) for n in sorted(s["lengths"])]
    model = _model(job, tasks[0].vocab, tasks[-1].length)
    generator = torch.Generator().manual_seed(job["seed"])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for task, pairs in short_then_all(tasks, s["steps"]):
            tokens, targets = task.batch(max(1, s["tokens"] // task.length), generator, pairs)
            yield tokens.to(device), targets.to(device)

    fit(model, batches(), s["steps"], s["learning_rate"])
    return {
        f"recall/{job['mechanism']}/{task.length}/{job['seed']}": _recalled(model, task, job["seed"], device)
        for task in tasks
    }


def short_then_all(tasks: Sequence[Recall], steps: int) -> Iterator[tuple[Recall, int]]:
    """The task and the pairs of each step.

    Two thirds go to the shortest task with a few pairs, some and all in turn, where the rule is found soonest;
    the rest to all tasks in turn with all pairs.
    """
    pairs = tasks[0].pairs
    counts = sorted({max(1, pairs // 4), max(1, pairs // 2), pairs})
    first = 2 * steps // 3
    for step in range(steps):
        if step < first:
            yield tasks[0], counts[step % len(counts)]
        else:
            yield tasks[step % len(tasks)], pairs


def fit(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, learning_rate: float
) -> list[float]:
    """Train with AdamW, warm-up, decay and clipped gradients; the loss of each step in bits."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_hold_decay(steps))
    losses = []
    model.train()
    for tokens, targets in batches:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()) * _BITS)
        if not math.isfinite(losses[-1]):
            raise ValueError(f"training diverged: the loss was {losses[-1]} at step {len(losses)} of {steps}")
    return losses


def warm_up_hold_decay(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate: up over a tenth of the steps, level, down to a tenth over the last third."""
    warm, down = max(1, steps // 10), max(1, steps // 3)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 1.0, 0.1 + 0.9 * (steps - step) / down)

    return factor


def _model(job: dict[str, Any], vocab: int, length: int) -> nn.Module:
    torch.manual_seed(job["seed"])
    s = job["settings"]
    model = sc.nn.Transformer(
        vocab=vocab,
        dim=s["dim"],
        depth=s["depth"],
        heads=s["heads"],
        mechanism=job["text"],
        max_length=length,
    )
    model.embedding = NearbyEmbedding(vocab, s["dim"], length)
    return model.to(job["device"])


class NearbyEmbedding(Embedding):
    """Token and position vectors, plus those of the three tokens before, each channel weighted for itself.

    A short convolution, as many small models have it: every mechanism gets the nearest context for free, so a short
    run shows what attention adds to it. For whole sequences only.
    """

    def __init__(self, vocab: int, dim: int, max_length: int) -> None:
        super().__init__(vocab, dim, max_length)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)
        self.before = nn.Parameter(torch.randn(NEARBY, dim) / 2)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        x = super().forward(tokens, start)
        length = x.shape[1]
        padded = F.pad(x, (0, 0, NEARBY, 0))
        for n, weight in enumerate(self.before, start=1):
            x = x + weight * padded[:, NEARBY - n : NEARBY - n + length]
        return x


@torch.no_grad()
def _heldout_bits(model: nn.Module, windows: Tensor, device: str) -> Tensor:
    """Mean bits per byte of each window."""
    model.eval()
    bits = []
    for rows in windows.split(max(1, _HELDOUT_TOKENS // windows.shape[1])):
        rows = rows.to(device)
        loss = F.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:], reduction="none")
        bits.append(loss.mean(1).cpu() * _BITS)
    return torch.cat(bits)


@torch.no_grad()
def _recalled(model: nn.Module, task: Recall, seed: int, device: str) -> dict[str, Any]:
    model.eval()
    generator = torch.Generator().manual_seed(2**32 + seed)
    tokens, targets = task.batch(_QUESTIONS // task.queries, generator)
    logits = torch.cat([model(part.to(device)).cpu() for part in tokens.split(8)])
    return {
        "length": task.length,
        "accuracy": accuracy(logits, targets),
        "chance": task.chance,
        "questions": int((targets != SILENT).sum()),
        "reach": f"the answer lies at least {task.beyond} tokens back",
    }


def _curve(losses: list[float], tokens: int) -> list[list[float]]:
    """Mean bits over equal stretches of training, each at its last token."""
    points = min(_CURVE_POINTS, len(losses))
    ends = [len(losses) * (n + 1) // points for n in range(points)]
    starts = [0, *ends[:-1]]
    return [
        [end * tokens, round(sum(losses[start:end]) / (end - start), 4)]
        for start, end in zip(starts, ends, strict=True)
    ]
