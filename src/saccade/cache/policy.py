"""Cache policies as values: what a layer keeps of its keys, for how large a budget.

Legend: b batch, g key-value heads, h query heads, n keys, L queries.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from saccade.cache.bases import Bases
from saccade.cache.moments import Moments
from saccade.cache.packed import PackedSegments
from saccade.cache.segments import Segments
from saccade.errors import MechanismError

POLICIES: dict[str, Callable[..., Policy]] = {}
FORMATS: dict[str, Callable[..., Format]] = {}


@dataclass(frozen=True)
class Sight:
    """What a policy sees of a layer when it chooses: all keys that are held, and the queries of the latest call.

    k (b, g, n, d), v (b, g, n, e), positions (b, g, n) in the text, `there` (b, g, n) which places hold a key; q (b, h, L, d)
    the latest queries, whose own keys are the last L places of every row; `mass` (b, g, n) the weight that each key has
    received so far and `moments` of all queries, where the policy asks for them; `length` tokens read, padding included; `layer` of `layers`. Keys stand in
    the order of the text, and a row without a key at some place has it at the end, or was padded on the left.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    there: Tensor
    q: Tensor
    length: int
    layer: int = 0
    layers: int = 1
    mass: Tensor | None = None
    moments: Moments | None = None

    @cached_property
    def counts(self) -> Tensor:
        """Keys of each row (b, g)."""
        return self.there.sum(-1)

    def weights(self, rows: int) -> Tensor:
        """Softmax weights of the last `rows` queries over the keys, the mean of the heads that share them, (b, g, rows, n)."""
        rows = min(rows, self.q.shape[2])
        b, g, _, d = self.k.shape
        q = self.q[:, :, -rows:].float().view(b, g, -1, rows, d)
        logits = q @ self.k.float().unsqueeze(2).transpose(-1, -2) / math.sqrt(d)
        last = self.length - rows + torch.arange(rows, device=q.device)
        seen = self.there[:, :, None] & (self.positions[:, :, None] <= last[:, None])
        return torch.softmax(logits.masked_fill(~seen[:, :, None], -torch.inf), -1).nan_to_num(0.0).mean(2)


@dataclass(frozen=True)
class Policy:
    """Keeps the keys that score highest, `keep` of them: a share of what was read (0 to 1, 1.0 all) or a number of tokens.

    The `sink` first tokens and the `recent` last ones are always kept. Scores of a subclass say what else is. Policies are
    values: compared by content, written as text, `a | b` for prefill by a and decoding by b.
    """

    keep: float | int = 0.25
    sink: int = 4
    recent: int = 16

    name: ClassVar[str]
    mass: ClassVar[bool] = False  # whether the weight that keys receive is added up
    moments: ClassVar[bool] = False  # whether mean and covariance of the queries are kept

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            POLICIES[cls.name] = cls

    def __post_init__(self) -> None:
        share = isinstance(self.keep, float)
        if isinstance(self.keep, bool) or not self.keep > 0 or (share and self.keep > 1):
            raise MechanismError(
                f"{self.name}: keep is a share above 0 and at most 1.0, or a number of tokens from 1, got {self.keep!r}"
            )
        if self.sink < 0 or self.recent < 0:
            raise MechanismError(
                f"{self.name}: sink and recent are at least 0, got {self.sink} and {self.recent}"
            )
        if not share and self.keep < self.sink + self.recent:
            raise MechanismError(
                f"{self.name}: {self.keep} tokens do not hold sink={self.sink} and recent={self.recent}; keep more, or "
                "lower these"
            )

    def scores(self, sight: Sight) -> Tensor:
        """How much each key is worth, (b, g, n); the greatest are kept."""
        raise NotImplementedError

    def budget(self, sight: Sight) -> Tensor:
        """Keys that each row may keep, integers broadcastable to (b, g)."""
        if isinstance(self.keep, float):
            least = self.sink + self.recent
            return torch.full_like(sight.counts, max(least, math.ceil(self.keep * sight.length)))
        return torch.full_like(sight.counts, self.keep)

    def worth(self, sight: Sight) -> Tensor:
        """Scores (b, g, n), infinite for keys that always stay, minus infinity where there is no key."""
        first = sight.there.cumsum(-1) <= self.sink
        fixed = first | (sight.positions >= sight.length - self.recent)
        return self.scores(sight).float().masked_fill(fixed, torch.inf).masked_fill(~sight.there, -torch.inf)

    def chosen(self, sight: Sight) -> Tensor:
        """Which keys stay, (b, g, n) boolean. Ties go to the later key."""
        worth = self.worth(sight)
        order = worth.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        return (rank.flip(-1) < self.budget(sight).unsqueeze(-1)) & sight.there

    @property
    def forgetting(self) -> float:
        """What a token more leaves of the weight that keys have received (1.0: all of it)."""
        return 1.0

    def __or__(self, other: Policy) -> Phases:
        return Phases(self, other)

    def __add__(self, other: Format) -> Stored:
        return Stored(self, other)

    def __str__(self) -> str:
        return _written(self)


@dataclass(frozen=True, init=False)
class Full(Policy):
    """All keys."""

    keep: float | int = 1.0
    sink: int = 0
    recent: int = 0

    name = "full"

    def __init__(self) -> None:
        super().__init__(1.0, 0, 0)

    def chosen(self, sight: Sight) -> Tensor:
        return sight.there


@dataclass(frozen=True)
class Phases:
    """One policy after reading a text, another one while tokens are added one by one."""

    prefill: Policy
    decode: Policy

    def __add__(self, other: Format) -> Stored:
        return Stored(self, other)

    def __str__(self) -> str:
        return f"{self.prefill} | {self.decode}"


@dataclass(frozen=True)
class Format:
    """How the keys that a policy keeps are stored. A value like a policy, and joined to one by +."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            FORMATS[cls.name] = cls

    def bases(self, sight: Sight) -> Bases | None:
        """What a layer's keys and values are turned by before they are packed; asked once, when it first packs."""
        return None

    def store(
        self, k: Tensor, v: Tensor, positions: Tensor, keep: Tensor, bases: Bases | None
    ) -> tuple[PackedSegments, Segments]:
        """The keys of k (b, g, n, d), v (b, g, n, e), positions (b, g, n) where `keep` (b, g, n): packed ones, and others."""
        raise NotImplementedError

    def __str__(self) -> str:
        return _written(self)


@dataclass(frozen=True)
class Stored:
    """What `choice` keeps, stored as `format` says."""

    choice: Policy | Phases
    format: Format

    def __str__(self) -> str:
        if isinstance(self.choice, Full):
            return str(self.format)
        return (
            f"({self.choice}) + {self.format}"
            if isinstance(self.choice, Phases)
            else f"{self.choice} + {self.format}"
        )


def _written(value: Policy | Format) -> str:
    given = ", ".join(
        f"{f.name}={getattr(value, f.name)!r}"
        for f in dataclasses.fields(value)
        if f.repr and getattr(value, f.name) != f.default
    )
    return f"{value.name}({given})" if given else value.name


Rule = Policy | Phases | Stored
"""What `policy` makes of a text."""


def choices(rule: Rule | Format) -> tuple[Policy, ...]:
    """The policies that choose keys, of all phases."""
    choice = rule.choice if isinstance(rule, Stored) else rule
    if isinstance(choice, Phases):
        return choice.prefill, choice.decode
    return (choice,) if isinstance(choice, Policy) else ()


def policy(text: str | Rule | Format) -> Rule:
    """A policy from its text: "snapkv(keep=0.25)", "snapkv(keep=512) | tova(keep=512)", "snapkv(keep=0.25) + kivi(bits=4)".

    `a | b` reads texts by a and decodes by b; `a + f` stores what a keeps in the format f, and f alone stores all keys.
    Raises MechanismError for unknown names and arguments.
    """
    if isinstance(text, Format):
        return Stored(Full(), text)
    if not isinstance(text, str):
        return text
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise MechanismError(f"{text!r} is no policy: {error.msg}; write name(argument=value)") from None
    found = _made(tree, text)
    return Stored(Full(), found) if isinstance(found, Format) else found


def _made(node: ast.expr, text: str) -> Rule | Format:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.BitOr | ast.Add):
        return _one(node, text)
    left, right = _made(node.left, text), _made(node.right, text)
    if isinstance(node.op, ast.BitOr):
        if isinstance(left, Policy) and isinstance(right, Policy):
            return Phases(left, right)
        raise MechanismError(
            f"{text!r}: | joins two policies, one for texts and one for decoding; a format belongs to both: (a | b) + format"
        )
    if isinstance(left, Policy | Phases) and isinstance(right, Format):
        return Stored(left, right)
    raise MechanismError(
        f"{text!r}: + joins a policy and the format that stores what it keeps ({', '.join(sorted(FORMATS))})"
    )


def _one(node: ast.expr, text: str) -> Policy | Format:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise MechanismError(f"{text!r} is no policy: write name(argument=value), or two joined by | or +")
    name = call.func.id
    known = POLICIES | FORMATS
    if name not in known:
        raise MechanismError(f"no policy is called {name!r}; there are {', '.join(sorted(known))}")
    try:
        given = [ast.literal_eval(a) for a in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
        return known[name](*given, **named)
    except MechanismError:
        raise
    except (TypeError, ValueError) as error:
        raise MechanismError(f"{text!r}: {error}") from None
