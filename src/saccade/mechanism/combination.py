"""Several mechanisms as one, and the causal form of any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from saccade.errors import MechanismError
from saccade.mechanism.base import Mechanism
from saccade.mechanism.values import Mixer, Pairwise, Recurrent
from saccade.parts.algebra import static_exist
from saccade.parts.base import Part, Sizes, Stream, Weight, register, value_text
from saccade.parts.heads import NONE
from saccade.parts.mask import Causal
from saccade.parts.tokens import On


@dataclass(frozen=True)
class Combine(Mechanism):
    """Several mechanisms as one."""

    children: tuple[Mechanism, ...] = ()

    family = "combine"
    word: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for c in self.children:
            if not isinstance(c, Mechanism):
                raise MechanismError(f"{self.word} joins mechanisms, got {value_text(c)}")
        if len(self.children) < 2:
            raise MechanismError(f"{self.word} joins two or more mechanisms, got {len(self.children)}")

    def __hash__(self) -> int:
        return self._hash

    def parts(self) -> Iterator[Part]:
        for child in self.children:
            yield from child.parts()

    @property
    def causal(self) -> bool:
        return all(c.causal for c in self.children)

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {name: w for c in self.children for name, w in c.weights(sizes).items()}

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {name: s for c in self.children for name, s in c.streams(sizes).items()}

    def buffers(self, sizes: Sizes, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        return {name: b for c in self.children for name, b in c.buffers(sizes, generator).items()}

    def buffer_names(self) -> dict[str, None]:
        return {name: None for c in self.children for name in c.buffer_names()}

    def kv_heads(self, heads: int) -> int:
        counts = {c.kv_heads(heads) for c in self.children}
        if len(counts) > 1:
            raise MechanismError(f"{self.word}: its members want different key-value heads, {sorted(counts)}")
        return counts.pop()

    def query_heads(self, heads: int) -> int:
        counts = {c.query_heads(heads) for c in self.children}
        if len(counts) > 1:
            raise MechanismError(f"{self.word}: its members project different query heads, {sorted(counts)}")
        return counts.pop()

    def source(self, on: On) -> str:
        names = {c.source(on) for c in self.children}
        if len(names) > 1:
            names -= {NONE}
        if len(names) > 1:
            raise MechanismError(
                f"{self.word}: its members take {on} from different sources, {sorted(names)}"
            )
        return names.pop()

    def canonical(self) -> str:
        return f"{self.word}({', '.join(map(str, self.children))})"


@dataclass(frozen=True)
class ByHead(Combine):
    """Consecutive equal shares of the heads, one mechanism each."""

    word = "by_head"

    __hash__ = Combine.__hash__

    def share(self, heads: int) -> int:
        """Heads a member; raises MechanismError where they do not divide."""
        if heads % len(self.children):
            raise MechanismError(
                f"by_head: {len(self.children)} members need a multiple of {len(self.children)} heads, got {heads}"
            )
        return heads // len(self.children)

    def kv_heads(self, heads: int) -> int:
        counts = [c.kv_heads(self.share(heads)) for c in self.children]
        if len(set(counts)) > 1:
            raise MechanismError(f"by_head: its members want different key-value heads, {counts}")
        return sum(counts)

    def query_heads(self, heads: int) -> int:
        counts = [c.query_heads(self.share(heads)) for c in self.children]
        if len(set(counts)) > 1:
            raise MechanismError(f"by_head: its members project different query heads, {counts}")
        return sum(counts)


@dataclass(frozen=True)
class Mix(Combine):
    """A weighted sum of the members' outputs; equal weights unless given."""

    shares: tuple[float, ...] = ()

    word = "mix"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.shares, tuple):
            raise MechanismError(
                f"mix: shares must be numbers in brackets, as in (0.25, 0.75), got {value_text(self.shares)}"
            )
        if self.shares and len(self.shares) != len(self.children):
            raise MechanismError(f"mix: one share a member, got {len(self.shares)} for {len(self.children)}")

    __hash__ = Combine.__hash__

    def share(self) -> tuple[float, ...]:
        """The weight of each member."""
        return self.shares or (1 / len(self.children),) * len(self.children)

    def canonical(self) -> str:
        inside = ", ".join(map(str, self.children))
        return f"mix({inside}, shares={value_text(self.shares)})" if self.shares else f"mix({inside})"


@dataclass(frozen=True)
class Join(Combine):
    """One softmax over the disjoint key sets of the members, merged by log-denominator."""

    word = "join"

    def __post_init__(self) -> None:
        super().__post_init__()
        for c in self.children:
            plain = isinstance(c, Pairwise) and not (c.reweight or c.value or c.output or c.slots)
            if not isinstance(c, Pairwise) or not plain or not c.static or "exp" not in c.normalizer.gives:
                raise MechanismError(
                    f"join merges softmax over key sets fixed by position, which {c} does not have; use mix"
                )
        i, j = torch.arange(97)[:, None], torch.arange(97)[None]
        count = sum(static_exist(c.pairs, i, j).long() for c in self.children if isinstance(c, Pairwise))
        if int(torch.as_tensor(count).max()) > 1:
            raise MechanismError(
                f"join: the members of {self.canonical()} share pairs, which would count twice; make them disjoint or unite the masks with |"
            )

    __hash__ = Combine.__hash__


def _combine_maker(cls: type[Combine]) -> Callable[..., Combine]:
    allowed = [f.name for f in dataclasses.fields(cls) if f.init and f.name != "children"]

    def make(*children: Mechanism, **options: Any) -> Combine:
        for name in options:
            if name not in allowed:
                known = f"mechanisms and {', '.join(allowed)}" if allowed else "mechanisms alone"
                raise MechanismError(f"{cls.word} takes {known}, got {name}")
        return cls(children=tuple(children), **options)

    make.__name__ = cls.word
    make.__doc__ = cls.__doc__
    return make


for _cls in (ByHead, Mix, Join):
    register(_cls.word, _combine_maker(_cls))


def causal(mechanism: Mechanism) -> Mechanism:
    """The causal form: the same mechanism under the limit that no query reads a later key.

    Raises NotSupported, naming a relative, where no causal form exists.
    """
    m = mechanism
    if m.causal:
        return m
    if isinstance(m, Combine):
        return dataclasses.replace(m, children=tuple(causal(c) for c in m.children))
    if isinstance(m, Mixer):
        return m.causal_form()
    assert isinstance(m, Pairwise | Recurrent)
    text = f"causal + {m}" if m.text and m.text != "full" else ""
    return dataclasses.replace(m, pairs=Causal() & m.pairs).named(text)
