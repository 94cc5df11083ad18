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

from saccade.cache.moments import Moments
from saccade.errors import MechanismError

POLICIES: dict[str, Callable[..., Policy]] = {}


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

    def __str__(self) -> str:
        given = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"{self.name}({given})" if given else self.name


@dataclass(frozen=True)
class Phases:
    """One policy after reading a text, another one while tokens are added one by one."""

    prefill: Policy
    decode: Policy

    def __str__(self) -> str:
        return f"{self.prefill} | {self.decode}"


def policy(text: str | Policy | Phases) -> Policy | Phases:
    """A policy from its text, such as "snapkv(keep=0.25)" or "snapkv(keep=512) | streaming_llm(keep=512)".

    Raises MechanismError for unknown names and arguments.
    """
    if not isinstance(text, str):
        return text
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise MechanismError(f"{text!r} is no policy: {error.msg}; write name(argument=value)") from None
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        return Phases(_one(tree.left, text), _one(tree.right, text))
    return _one(tree, text)


def _one(node: ast.expr, text: str) -> Policy:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise MechanismError(f"{text!r} is no policy: write name(argument=value), or two joined by |")
    name = call.func.id
    if name not in POLICIES:
        raise MechanismError(f"no policy is called {name!r}; there are {', '.join(sorted(POLICIES))}")
    try:
        given = [ast.literal_eval(a) for a in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
        return POLICIES[name](*given, **named)
    except MechanismError:
        raise
    except (TypeError, ValueError) as error:
        raise MechanismError(f"{text!r}: {error}") from None
