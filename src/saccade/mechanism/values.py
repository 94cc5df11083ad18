"""What is computed, by family: Pairwise, Recurrent and Mixer; `combination` holds those made of several."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from saccade.cost import Cost, Request
from saccade.errors import MechanismError, NotSupported
from saccade.mechanism.base import Mechanism, check_parts
from saccade.parts.algebra import And, Full, Or, Pairs, is_static, split
from saccade.parts.base import Causality, Part, call_text, check_argument
from saccade.parts.decay import Decay
from saccade.parts.feature import Feature, Identity
from saccade.parts.heads import INPUT, Heads
from saccade.parts.logits import Logits
from saccade.parts.mask import Causal
from saccade.parts.memory import Ratio
from saccade.parts.normalizer import Normalizer, Softmax
from saccade.parts.output import Output
from saccade.parts.reweight import Reweight
from saccade.parts.score import Dot, Score
from saccade.parts.selection import Selection
from saccade.parts.slots import Slots
from saccade.parts.state import State
from saccade.parts.summary import Summary
from saccade.parts.tiles import Tiles
from saccade.parts.tokens import On, TokenMap
from saccade.parts.value import Value
from saccade.parts.write import Write

__all__ = ["Mechanism", "Mixer", "Pairwise", "Recurrent"]


@dataclass(frozen=True)
class Pairwise(Mechanism):
    """Logits for pairs, then weights, then a mix of values.

    Evaluated in this order: heads, tokens, pairs, summary, slots, score, logits, normalizer, reweight, value, output.
    """

    heads: Heads | None = None
    tokens: tuple[TokenMap, ...] = ()
    pairs: Pairs = Full()
    summary: Summary | None = None
    slots: Slots | None = None
    score: Score = Dot()
    logits: tuple[Logits, ...] = ()
    normalizer: Normalizer = Softmax()
    reweight: tuple[Reweight, ...] = ()
    value: tuple[Value, ...] = ()
    output: tuple[Output, ...] = ()
    tiles: Tiles | None = None

    family = "pairwise"

    def __post_init__(self) -> None:
        if self.learned_query and self.pairs != Causal():
            raise MechanismError(
                f"learned_query reads a prefix a position: it runs under `causal` alone, got pairs {self.pairs}"
            )
        check_parts(self)
        self._check_buckets()
        for part in self.logits[:-1]:
            if part.drops:
                raise MechanismError(
                    f"{part} drops pairs for good, so it stands last of the logits: put it after {self.logits[-1]}"
                )
        placed = [*self.logits, *(p for p in self.pairs.leaves() if p != Full())]
        if self.summary is not None and placed:
            raise MechanismError(
                f"{placed[0]} asks where a key stands, and {self.summary.name} mixes keys of all positions; leave one of them out"
            )

    def _check_buckets(self) -> None:
        """Raise MechanismError where buckets meet what does not reach into them."""
        inside = [p for p in self.pairs.leaves() if p.reach == "bucket"]
        if not inside:
            return
        form = split(self.pairs)
        if form is None or form[1] is not None or len(form[2]) > 1:
            raise MechanismError(
                f"{inside[0]} stands alone or under limits such as causal, and unites with nothing: got pairs {self.pairs}; "
                "use mix(...) or by_head(...)"
            )
        odd = () if "exp" in self.normalizer.gives else (self.normalizer,)
        more: tuple[Part | None, ...] = (
            self.summary,
            self.slots,
            *self.logits,
            *odd,
            *self.reweight,
            *self.value,
        )
        for part in more:
            if part is not None:
                raise MechanismError(
                    f"{inside[0]} runs softmax over a score inside its buckets and knows no {part.kind}, such as {part}; "
                    "leave one of them out"
                )

    def __hash__(self) -> int:
        return self._hash

    def parts(self) -> Iterator[Part]:
        for f in _FIELDS[Pairwise]:
            value = getattr(self, f)
            if f == "pairs":
                yield from self.pairs.leaves()
            elif isinstance(value, tuple):
                yield from value
            elif value is not None:
                yield value
        for leaf in self.pairs.leaves():
            proxy = getattr(leaf, "proxy", None)
            if proxy is not None:
                yield proxy

    @property
    def causal(self) -> bool:
        return self.pairs.looks_back

    @property
    def learned_query(self) -> bool:
        return self.heads is not None and self.heads.learned_query

    @cached_property
    def makers(self) -> tuple[Part, ...]:
        """The parts that derive something from each token of a call."""
        return tuple(p for p in self.parts() if type(p).extras is not Part.extras)

    @property
    def has_lse(self) -> bool:
        """True when a row over split keys merges by log-denominator: shares of pairs that do not see other pairs or heads."""
        tied = any(p.reach in ("halo", "head") for p in (*self.logits, *self.reweight))
        return self.normalizer.has_lse and not tied

    @property
    def halo(self) -> tuple[int, int, int]:
        """Rows above, keys to the left and keys to the right that the logits of a pair depend on, all parts together."""
        above, left, right = (sum(p.halo[n] for p in self.logits) for n in range(3))
        return above, left, right

    @property
    def static(self) -> bool:
        """True when position alone decides which pairs exist."""
        return is_static(self.pairs)

    @property
    def sweeps(self) -> bool:
        """True when a part runs along the keys of a row, and so must see all between the first and the last."""
        return any(p.reach == "sweep" for p in (*self.logits, self.normalizer))

    def kv_heads(self, heads: int) -> int:
        return heads if self.heads is None else self.heads.kv_heads(heads)

    def query_heads(self, heads: int) -> int:
        return heads if self.heads is None else self.heads.query_heads(heads)

    def source(self, on: On) -> str:
        return INPUT if self.heads is None else self.heads.source(on)

    def canonical(self) -> str:
        terms: list[str] = []
        for f in _FIELDS[Pairwise]:
            value = getattr(self, f)
            if f == "pairs":
                terms += _pairs_text(self.pairs)
            elif isinstance(value, tuple):
                terms += [str(p) for p in value]
            elif value is not None and value != _DEFAULTS.get(f):
                terms.append(str(value))
        return " + ".join(terms) or "full"


@dataclass(frozen=True)
class Recurrent(Mechanism):
    """A state that is written with each key and value and read with each query.

    S_t = exp(decay_t) S_{t-1} + phi(k_t) v_t, out_t = phi(q_t) S_t, divided as `ratio` says; `write` says otherwise how a
    key and a value enter. Without a causal limit every query reads the final state.
    """

    heads: Heads | None = None
    tokens: tuple[TokenMap, ...] = ()
    pairs: Pairs = Full()
    feature: Feature = Identity()
    decay: Decay | None = None
    write: Write | None = None
    ratio: Ratio | None = None
    output: tuple[Output, ...] = ()

    family = "recurrent"

    def __post_init__(self) -> None:
        if self.pairs not in (Full(), Causal()):
            raise MechanismError(
                f"a recurrent mechanism keeps one state for all keys: its pairs are `full` or `causal`, got {self.pairs}; "
                "join it with a pairwise mechanism instead, as in mix(linear, window(64))"
            )
        if self.heads is not None and self.heads.learned_query:
            raise MechanismError(
                "learned_query belongs to pairwise mechanisms; a recurrent one reads with the token's query"
            )
        if self.decay is not None and not self.pairs.looks_back:
            raise MechanismError(
                f"{self.decay.name} forgets with distance, which needs an order: add `causal`"
            )
        if self.write is not None and self.write.overwrites and not self.pairs.looks_back:
            raise MechanismError(
                f"{self.write.name} overwrites what came before, which needs an order: add `causal`"
            )
        if self.decay is not None and self.decay.channels and "ratio" in self.feature.needs:
            raise MechanismError(
                f"{self.feature.name} keeps one scale for all channels, and {self.decay.name} differs between them; use gate_decay"
            )
        check_parts(self)

    def __hash__(self) -> int:
        return self._hash

    def parts(self) -> Iterator[Part]:
        for f in _FIELDS[Recurrent]:
            value = getattr(self, f)
            if isinstance(value, tuple):
                yield from value
            elif value is not None:
                yield value

    @property
    def causal(self) -> bool:
        return self.pairs.looks_back

    def kv_heads(self, heads: int) -> int:
        return heads if self.heads is None else self.heads.kv_heads(heads)

    def query_heads(self, heads: int) -> int:
        return heads if self.heads is None else self.heads.query_heads(heads)

    def source(self, on: On) -> str:
        return INPUT if self.heads is None else self.heads.source(on)

    def canonical(self) -> str:
        terms: list[str] = []
        for f in _FIELDS[Recurrent]:
            value = getattr(self, f)
            if f == "feature" or (f == "pairs" and value != Full()):
                terms.append(str(value))
            elif isinstance(value, tuple):
                terms += [str(p) for p in value]
            elif value is not None and f != "pairs":
                terms.append(str(value))
        return " + ".join(terms)


@dataclass(frozen=True)
class Mixer(Mechanism):
    """A map of whole q, k and v that is no sum of values over weighted pairs, such as a product of softmaxes.

    A mixer is its own part: it declares weights, streams and buffers itself, `mix` computes it and `define` is its
    plain definition. It is whole by itself in the text form. A causal one decodes: its state keeps the latest rows of
    what it `keeps`, and `mix` gets them with the new ones, key row r at position r + start and query row r at r + offset;
    one whose state is more than rows says so by `fresh` and `advance`.
    """

    family = "mixer"
    name: ClassVar[str] = ""
    relative: ClassVar[str] = ""
    keeps: ClassVar[tuple[On, ...]] = ("k", "v")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            if f.init:
                check_argument(self.name, f.name, getattr(self, f.name), hints[f.name], f.metadata)

    def parts(self) -> Iterator[Part]:
        return iter(())

    @property
    def causal(self) -> bool:
        return False

    @property
    def causality(self) -> Causality:
        return "never"

    @property
    def horizon(self) -> int | None:
        """How many of the latest keys a query reads at most, its own included; None where there is no bound."""
        return None

    def causal_form(self) -> Mixer:
        """The same without the future. Raises NotSupported, naming a relative, where there is none."""
        raise NotSupported(
            f"{self} mixes all positions and has no causal form; its causal relative: {self.relative}"
        )

    def mix(self, c: Any) -> torch.Tensor:
        """The output (b, h, L, e) of a context, in float32 or wider."""
        raise NotImplementedError

    def select(self, c: Any) -> Selection | None:
        """What is chosen by content, to be kept and replayed; None for one that chooses nothing."""
        return None

    def define(self, c: Any) -> torch.Tensor:
        """The same by the formula of its paper, slowly."""
        raise NotImplementedError

    def fresh(
        self, batch: int, sizes: dict[On, tuple[int, int]], dtype: torch.dtype, device: str | torch.device
    ) -> State:
        """The state before the first token, given heads and size of q, k and v: no rows of what it keeps."""
        return State(
            {
                n: torch.empty(batch, sizes[n][0], 0, sizes[n][1], dtype=dtype, device=device)
                for n in self.keeps
            }
        )

    def advance(self, c: Any, state: State) -> tuple[torch.Tensor, State] | None:
        """New tokens after a state, their output and the next state; None where `mix` does it with the rows that are kept."""
        return None

    def cost(self, r: Request) -> Cost:
        """FLOPs, bytes and peak memory of `mix`."""
        raise NotImplementedError

    def canonical(self) -> str:
        return call_text(self.name, self)


_FIELDS: dict[type, tuple[str, ...]] = {
    cls: tuple(f.name for f in dataclasses.fields(cls) if f.init) for cls in (Pairwise, Recurrent)
}
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Pairwise) if f.init}


def _pairs_text(pairs: Pairs) -> list[str]:
    """`+` terms of an expression: limits, then allowances; an expression of another form is one term."""
    if isinstance(pairs, Full):
        return []
    terms = pairs.parts if isinstance(pairs, And) else (pairs,)
    limits = [t for t in terms if not isinstance(t, And | Or) and t.joins == "and"]
    rest = [t for t in terms if t not in limits]
    if not rest:
        return [str(t) for t in limits]
    members = rest[0].parts if isinstance(rest[0], Or) else (rest[0],)
    simple = len(rest) == 1 and all(not isinstance(m, And | Or) and m.joins == "or" for m in members)
    if simple and list(terms) == limits + rest:
        return [str(t) for t in (*limits, *members)]
    return [f"({pairs})"]
