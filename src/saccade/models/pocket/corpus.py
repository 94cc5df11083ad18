"""What saccade-pocket learns from: Python's library and documentation, books, and generated questions."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from saccade.tasks import questions

BOS, EOS, PAD, VOCAB = 256, 257, 258, 288
HELD_OUT = 0.05
ANSWER_WEIGHT = 4.0
SKIPPED = ("site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data")
SUFFIXES = (".py", ".txt", ".rst", ".md")


@dataclass(frozen=True)
class Domain:
    """A kind of text: bytes to learn from and bytes held out, documents divided by EOS; `share` is its part of all text."""

    name: str
    train: np.ndarray
    held_out: np.ndarray
    share: float


def library(root: Path | None = None) -> list[Path]:
    """The Python files of the standard library."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not set(p.relative_to(root).parts[:-1]) & set(SKIPPED))


def texts(folder: Path) -> list[Path]:
    """The text files below a folder; raises ValueError where there are none."""
    found = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} holds no {', '.join(SUFFIXES)} files")
    return found


def domain(name: str, files: Sequence[Path], share: float) -> Domain:
    """Documents as one row of numbers; a twentieth of every long file, or of all short ones, is held out."""
    train: list[np.ndarray] = []
    held: list[np.ndarray] = []
    for file in files:
        data = np.frombuffer(file.read_bytes(), dtype=np.uint8).astype(np.uint16)
        if len(data) > 200_000:
            cut = int(len(data) * (1 - HELD_OUT))
            parts = [(train, data[:cut]), (held, data[cut:])]
        else:
            chosen = int(hashlib.sha256(file.name.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT
            parts = [(held if chosen else train, data)]
        for side, piece in parts:
            side += [piece, np.array([EOS], dtype=np.uint16)]
    return Domain(name, np.concatenate(train), np.concatenate(held), share)


def asked(text: bytes, room: int, draw: random.Random) -> questions.Asked:
    """One context with questions of any kind, at most `room` bytes long; `text` is the filler, at least as long."""
    kind = draw.choices(("needle", "recall", "variables", "copy"), (4, 3, 2, 2))[0]
    seed = draw.getrandbits(62)
    turns = draw.randint(1, max(1, min(6, room // 120)))
    if kind == "recall":
        return questions.recall(room, seed, turns)
    if kind == "copy":
        return questions.copy(room, seed, draw.randint(1, max(1, min(60, (room - 60) // 14))))
    if kind == "variables":
        chains = draw.randint(1, max(1, min(3, room // 120)))
        return questions.variables(text, room, seed, chains, draw.randint(1, 2), min(turns, chains))
    return questions.needle(text, room, seed, draw.randint(1, max(1, min(4, room // 150))), turns)


class Rows(IterableDataset):
    """Endless batches of `length` tokens: inputs and targets (batch, length) and the weight of each target.

    Each row starts with BOS. A share `asked` of the rows are questions, where what was drawn at random costs nothing and
    answers count several times; the others are text.
    """

    def __init__(self, domains: Sequence[Domain], length: int, batch: int, asked: float, seed: int) -> None:
        self.domains, self.length, self.batch, self.asked, self.seed = domains, length, batch, asked, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        draw = random.Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            rows = [self._row(draw) for _ in range(self.batch)]
            tokens = torch.from_numpy(np.stack([r for r, _ in rows]).astype(np.int64))
            weights = torch.from_numpy(np.stack([w for _, w in rows]))
            yield tokens[:, :-1], tokens[:, 1:], weights

    def _text(self, draw: random.Random, size: int) -> np.ndarray:
        (chosen,) = draw.choices(self.domains, [d.share for d in self.domains])
        start = draw.randrange(len(chosen.train) - size)
        return chosen.train[start : start + size]

    def _row(self, draw: random.Random) -> tuple[np.ndarray, np.ndarray]:
        length = self.length
        row = np.full(length + 1, BOS, dtype=np.uint16)
        weight = np.ones(length, dtype=np.float32)
        at = 0
        if draw.random() < self.asked:
            while length - at >= 150:
                filler = self._text(draw, length)
                plain = filler.clip(max=255).astype(np.uint8).tobytes().replace(b"\xff", b" ")
                room = length - at if draw.random() < 0.7 else draw.randint(150, length - at)
                made = asked(plain, room, draw)
                data = np.frombuffer(made.text(), dtype=np.uint8)
                row[1 + at : 1 + at + len(data)] = data
                if made.kind in ("recall", "copy"):
                    weight[at : at + len(made.context)] = 0
                for start, end in made.answers():
                    weight[at + start : at + end] = ANSWER_WEIGHT
                at += len(data)
        if at < length:
            row[1 + at :] = self._text(draw, length - at)
        return row, weight
