"""What every mechanism is: a frozen value made of parts, which may stand on a grid."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from saccade.errors import MechanismError, NotSupported
from saccade.parts.base import PARTS, Causality, Part, Sizes, Stream, Weight
from saccade.parts.heads import INPUT
from saccade.parts.tokens import On, Rotary


@dataclass(frozen=True)
class Mechanism:
    """A description of attention. It compares and hashes by value, holds no tensors, and its text parses back."""

    family: ClassVar[str] = ""
    text: str = field(default="", init=False, repr=False, compare=False)

    def named(self, text: str) -> Mechanism:
        """The same value, printed as `text`."""
        object.__setattr__(self, "text", text)
        return self

    def parts(self) -> Iterator[Part]:
        """Every part, in order of evaluation."""
        raise NotImplementedError

    @property
    def causal(self) -> bool:
        """True when no query reads a later key."""
        raise NotImplementedError

    @property
    def causality(self) -> Causality:
        """`safe`, `leak` (a choice or statistic reads the future in training) or `never` (no causal form exists)."""
        kinds = {p.causal for p in self.parts()}
        return "never" if "never" in kinds else "leak" if "leak" in kinds else "safe"

    @property
    def learned_query(self) -> bool:
        """True where all rows share one query, which a layer learns."""
        return False

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        """Learned tensors that the parts declare, by name."""
        return {name: w for p in self.parts() for name, w in p.weights(sizes).items()}

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        """Per-token inputs besides q, k and v, by name."""
        return {name: s for p in self.parts() for name, s in p.streams(sizes).items()}

    def buffers(self, sizes: Sizes, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """Fresh buffers that the parts keep, by name."""
        return {name: b for p in self.parts() for name, b in p.buffers(sizes, generator).items()}

    def buffer_names(self) -> dict[str, None]:
        """The names of the buffers, in order."""
        return {name: None for p in self.parts() for name in p.buffer_names}

    def kv_heads(self, heads: int) -> int:
        """Key-value heads of a layer with `heads` query heads."""
        return heads

    def query_heads(self, heads: int) -> int:
        """Query heads that a layer projects; the others share them."""
        return heads

    def source(self, on: On) -> str:
        """What a layer makes q, k or v from; see `Heads.source`."""
        return INPUT

    def on_grid(self, grid: Sequence[int]) -> Mechanism:
        """The same for tokens that are the cells of a grid, row by row: parts that ask for a grid get this one."""
        if not grid or any(not isinstance(n, int) or n < 1 for n in grid):
            raise MechanismError(f"a grid has a whole number of at least 1 an axis, got {tuple(grid)}")
        return _on_grid(self, tuple(grid))

    @cached_property
    def grids(self) -> frozenset[tuple[int, ...] | None]:
        """The grids on which its parts stand; None for one that was left open."""
        return frozenset(p.grid for p in self.parts() if hasattr(p, "grid"))

    @cached_property
    def _hash(self) -> int:
        return hash((type(self), *(getattr(self, f.name) for f in dataclasses.fields(self) if f.compare)))

    def __str__(self) -> str:
        return self.text or self.canonical()

    def canonical(self) -> str:
        """The text of the parts themselves, whatever name the mechanism was asked by."""
        raise NotImplementedError


@functools.lru_cache(maxsize=1024)
def _on_grid(m: Mechanism, grid: tuple[int, ...]) -> Mechanism:
    placed: Mechanism = _placed(m, grid)
    return placed


def _placed(value: Any, grid: tuple[int, ...]) -> Any:
    """A mechanism, a part or a tuple of them with every `grid` that was left open set."""
    if isinstance(value, tuple):
        return tuple(_placed(x, grid) for x in value)
    if not isinstance(value, Mechanism | Part):
        return value
    changed = {}
    for f in dataclasses.fields(value):
        old = getattr(value, f.name)
        new = grid if f.name == "grid" and old is None else _placed(old, grid)
        if f.init and new is not old and new != old:
            changed[f.name] = new
    return dataclasses.replace(value, **changed) if changed else value  # type: ignore[arg-type]


def check_parts(m: Mechanism) -> None:
    """Raise unless every part of a mechanism finds what it needs and nothing breaks it."""
    given = {g for p in m.parts() for g in p.gives}
    broken = {b: p for p in m.parts() for b in p.breaks}
    for p in m.parts():
        for need in p.needs:
            if need in broken:
                raise MechanismError(
                    f"{p.name} needs {need}, which {broken[need].name} breaks; leave one of them out"
                )
            if need not in given:
                raise MechanismError(f"{p.name} needs {need}, which no part here gives; {_givers(need)}")
        if p.causal == "never" and m.causal:
            raise NotSupported(
                f"{p.name} mixes all positions and has no causal form; its causal relative: {p.relative}"
            )

    turning = [p for p in m.parts() if isinstance(p, Rotary)]
    if len(turning) > 1:
        raise MechanismError(f"{turning[0]} and {turning[1]} would turn the same channels; keep one of them")


def _givers(need: str) -> str:
    names = [n for n, c in PARTS.items() if need in c.gives]
    return f"add one of: {', '.join(names)}" if names else "it cannot be combined here"
