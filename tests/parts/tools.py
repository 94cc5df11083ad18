"""Parts bound to tensors, for tests of one part."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import saccade as sc
from saccade.parts.pair import Context, Program, Tile


def bound(m: sc.Pairwise, q: Tensor, k: Tensor, v: Tensor | None = None, **named: Any) -> Program:
    """A mechanism over tensors, the queries at the end of the keys; `named` are params, streams, buffers."""
    return Program.bind(m, Context(q, k, k if v is None else v, k.shape[2] - q.shape[2], **named))


def tile(program: Program, rows: slice | None = None, cols: tuple[int, int] | None = None) -> Tile:
    """Rows against keys of a bound mechanism; all of them unless given."""
    return program.tile(rows or slice(0, program.rows), [cols or (0, program.keys)])


def logits(m: sc.Pairwise, q: Tensor, k: Tensor, v: Tensor | None = None, **named: Any) -> Tensor:
    """All logits, -inf where no pair exists."""
    program = bound(m, q, k, v, **named)
    return program.logits(tile(program))
