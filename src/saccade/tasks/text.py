"""English text as bytes, with a held-out part that is never trained on."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BUNDLED = "pydoc_data.topics"
VOCAB = 256
_HELDOUT_SHARE = 0.1
_HELDOUT_BLOCKS = 10


@dataclass(frozen=True)
class Corpus:
    """A text as blocks of bytes: `train` and `heldout` are uint8 tensors that share no byte."""

    train: tuple[Tensor, ...]
    heldout: tuple[Tensor, ...]
    name: str
    sha256: str

    def batch(self, size: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw `size` training windows: (size, length + 1) int64, inputs and next-byte targets in one row."""
        blocks = [block for block in self.train if len(block) > length]
        ends = torch.tensor([len(block) - length for block in blocks]).cumsum(0)
        draws = torch.randint(int(ends[-1]), (size,), generator=generator)
        rows = []
        for draw, at in zip(
            draws.tolist(), torch.searchsorted(ends, draws, right=True).tolist(), strict=True
        ):
            start = draw - (int(ends[at - 1]) if at else 0)
            rows.append(blocks[at][start : start + length + 1])
        return torch.stack(rows).long()

    def windows(self, length: int) -> Tensor:
        """All held-out windows, in order and without overlap of targets: (count, length + 1) int64."""
        rows = [block.unfold(0, length + 1, length) for block in self.heldout if len(block) > length]
        return torch.cat(rows).long()

    def baseline(self, length: int) -> float:
        """Bits per byte of the held-out windows for a model that knows the byte frequencies of `train` alone."""
        counts = torch.bincount(torch.cat(self.train), minlength=VOCAB).double() + 1
        return float(-(counts / counts.sum()).log2()[self.windows(length)[:, 1:]].mean())


def load(path: Path | None = None, *, window: int) -> Corpus:
    """The corpus of a UTF-8 text file, or of the text that CPython ships, for windows of `window` + 1 bytes.

    Raises OSError for a file that cannot be read, ValueError for one that is empty, too short for one training
    and one held-out window, binary, or not UTF-8.
    """
    data = _bundled() if path is None else path.read_bytes()
    name = BUNDLED if path is None else str(path)
    if path is not None:
        _require_text(data, name)
    if len(data) < 2 * (window + 1):
        raise ValueError(
            f"{name} holds {len(data):,} bytes: training windows of {window:,} bytes need at least "
            f"{2 * (window + 1):,}, so that one can be trained on and one held out"
        )
    train, heldout = _split(torch.frombuffer(bytearray(data), dtype=torch.uint8), window)
    return Corpus(train, heldout, name, hashlib.sha256(data).hexdigest())


def _bundled() -> bytes:
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()


def _require_text(data: bytes, name: str) -> None:
    if not data:
        raise ValueError(f"{name} is empty: give a UTF-8 text file")
    if b"\0" in data:
        raise ValueError(
            f"{name} looks binary (a zero byte at offset {data.index(0):,}): give a UTF-8 text file"
        )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start:,}): "
            "convert it to UTF-8 first"
        ) from None


def _split(data: Tensor, window: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Cut stretches of equal length in two, the second part held out; each part holds at least one window."""
    least = window + 1
    stretches = max(1, min(_HELDOUT_BLOCKS, int(len(data) * _HELDOUT_SHARE) // least))
    train, heldout = [], []
    for stretch in data.tensor_split(stretches):
        held = max(least, math.ceil(len(stretch) * _HELDOUT_SHARE))
        train.append(stretch[:-held])
        heldout.append(stretch[-held:])
    return tuple(train), tuple(heldout)
