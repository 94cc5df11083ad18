"""What is computed: a mechanism is a frozen value, a tagged union of Pairwise, Recurrent and Combine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from saccade.cost import Cost, Request
from saccade.errors import MechanismError, NotSupported
from saccade.parts.base import NAMES, Causality, Part, Sizes, Stream, Weight, call_text, register, value_text
from saccade.parts.feature import Feature, Identity
from saccade.parts.heads import INPUT, Heads
from saccade.parts.logits import Logits
from saccade.parts.mask import And, Causal, Full, Or, Pairs, is_static, split, static_exist
from saccade.parts.memory import Decay, Ratio
from saccade.parts.normalizer import Normalizer, Softmax
from saccade.parts.output import Output
from saccade.parts.reweight import Reweight
from saccade.parts.score import Dot, Score
from saccade.parts.slots import Slots
from saccade.parts.summary import Summary
from saccade.parts.tiles import Tiles
from saccade.parts.tokens import On, Rotary, TokenMap
from saccade.parts.value import Value


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


def _check_parts(m: Mechanism) -> None:
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
    from saccade.parts.base import PARTS

    names = [n for n, c in PARTS.items() if need in c.gives]
    return f"add one of: {', '.join(names)}" if names else "it cannot be combined here"


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
        if self.heads is not None and self.heads.learned_query and self.pairs != Causal():
            raise MechanismError(
                f"learned_query reads a prefix a position: it runs under `causal` alone, got pairs {self.pairs}"
            )
        _check_parts(self)
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

    S_t = exp(decay) S_{t-1} + phi(k_t) v_t, out_t = phi(q_t) S_t, divided as `ratio` says. Without a causal limit
    every query reads the final state.
    """

    heads: Heads | None = None
    tokens: tuple[TokenMap, ...] = ()
    pairs: Pairs = Full()
    feature: Feature = Identity()
    decay: Decay | None = None
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
        _check_parts(self)

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
    plain definition. It is whole by itself in the text form.
    """

    family = "mixer"
    name: ClassVar[str] = ""
    relative: ClassVar[str] = ""

    def parts(self) -> Iterator[Part]:
        return iter(())

    @property
    def causal(self) -> bool:
        return False

    @property
    def causality(self) -> Causality:
        return "never"

    def mix(self, c: Any) -> torch.Tensor:
        """The output (b, h, L, e) of a context, in float32 or wider."""
        raise NotImplementedError

    def define(self, c: Any) -> torch.Tensor:
        """The same by the formula of its paper, slowly."""
        raise NotImplementedError

    def cost(self, r: Request) -> Cost:
        """FLOPs, bytes and peak memory of `mix`."""
        raise NotImplementedError

    def canonical(self) -> str:
        return call_text(self.name, self)


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


_FIELDS: dict[type, tuple[str, ...]] = {
    cls: tuple(f.name for f in dataclasses.fields(cls) if f.init) for cls in (Pairwise, Recurrent)
}
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Pairwise) if f.init}


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
        raise NotSupported(
            f"{m} mixes all positions and has no causal form; its causal relative: {m.relative}"
        )
    assert isinstance(m, Pairwise | Recurrent)
    text = f"causal + {m}" if m.text and m.text != "full" else ""
    return dataclasses.replace(m, pairs=Causal() & m.pairs).named(text)


def names() -> dict[str, Callable[..., Any]]:
    """Every word of the text form, with what it makes."""
    return dict(NAMES)
