"""What every part is: a frozen value with a unique text name, checked arguments and declared needs."""

from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from saccade.errors import MechanismError

if TYPE_CHECKING:
    from saccade.parts.pair import Context

Side = Literal["q", "k"]
Causality = Literal["safe", "leak", "never"]

PARTS: dict[str, type[Part]] = {}
NAMES: dict[str, Callable[..., Any]] = {}


def arg(
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field whose range is checked when the value is made."""
    return field(default=default, metadata={"at_least": at_least, "above": above, "choices": choices})


def register(name: str, maker: Callable[..., Any]) -> None:
    """Give `name` to a part class or a constructor; names are unique across kinds."""
    if name in NAMES and NAMES[name] is not maker:
        raise MechanismError(f"the name {name!r} is taken by {NAMES[name]!r}; choose another")
    NAMES[name] = maker


def nearest(name: str) -> str:
    """The registered names closest to `name`, as the end of an error message."""
    close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.5)
    close += [n for n in sorted(NAMES) if n.startswith(name[:3]) and n not in close][:3]
    listing = ", ".join(close) if close else ", ".join(sorted(NAMES))
    return f"nearest names: {listing}" if close else f"known names: {listing}"


@dataclass(frozen=True)
class Weight:
    """A learned tensor that a part declares: its shape and how it starts.

    `split` draws pairs (..., 2) that sum to one, the first uniform in 0..1.
    """

    shape: tuple[int, ...]
    init: Literal["normal", "zeros", "ones", "eye", "split"] = "normal"
    std: float = 0.02

    def make(self, generator: torch.Generator | None = None) -> Tensor:
        """A fresh tensor of this shape."""
        if self.init == "eye":
            return torch.eye(self.shape[-2], self.shape[-1]).expand(self.shape).clone()
        if self.init == "normal":
            return torch.randn(self.shape, generator=generator) * self.std
        if self.init == "split":
            first = torch.rand(self.shape[:-1], generator=generator)
            return torch.stack((first, 1 - first), -1)
        return torch.full(self.shape, float(self.init == "ones"))


@dataclass(frozen=True)
class Stream:
    """What tokens carry for every head besides q, k and v: on which side, and how a layer makes it from its input.

    One number, (B, H, n), or `width` numbers, (B, H, n, width); one head, (B, 1, n), where it is not `per_head`. A layer
    projects its input, through `hidden` tanh units a head when given; a stream of `positions` is then squashed to 0..S, the
    number of keys. `start` spreads the projection's biases at first evenly between two numbers.
    """

    side: Side
    width: int | None = None
    hidden: int = 0
    positions: bool = False
    per_head: bool = True
    start: tuple[float, float] | None = None

    def shape(self, batch: int, heads: int, tokens: int) -> tuple[int, ...]:
        """The shape of the stream for so many tokens of its side."""
        own = (batch, heads if self.per_head else 1, tokens)
        return own if self.width is None else (*own, self.width)


@dataclass(frozen=True)
class Sizes:
    """The sizes that a part may ask for when it declares its weights, streams and buffers."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class Part:
    """A frozen piece of a mechanism.

    `kind` says where it belongs, `name` is its word in the text form, `reach` what it must see of a row
    before it can weigh one pair, `causal` whether it keeps the future out of earlier outputs.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    reach: ClassVar[str] = "pair"
    causal: ClassVar[Causality] = "safe"
    relative: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    buffer_names: ClassVar[tuple[str, ...]] = ()
    straight_through: ClassVar[bool] = False  # True where the gradient is that of a softer formula
    head_bound: ClassVar[bool] = False  # True where the formula asks which of how many heads it stands in

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__ and cls.name:
            register(cls.name, cls)
            PARTS[cls.name] = cls

    def __post_init__(self) -> None:
        own: Any = type(self)
        hints = _hints(own)
        for f in fields(self):
            check_argument(
                f"{self.name or type(self).__name__}",
                f.name,
                getattr(self, f.name),
                hints[f.name],
                f.metadata,
            )

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        """Learned tensors, by name."""
        return {}

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        """Per-token inputs besides q, k and v, by name."""
        return {}

    def extras(self, c: Context) -> dict[str, tuple[Side, Tensor]]:
        """What the part derives from each token once a call, for its tiles: name to side and (B, heads, n, ...)."""
        return {}

    def losses(self, c: Context) -> dict[str, Tensor]:
        """Scalars that training should add to its objective, by name; `c` holds q, k and v before the token maps, those of a
        score after them."""
        return {}

    def buffers(self, sizes: Sizes, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Tensors that are kept beside the weights and change only by an explicit refresh."""
        return {}

    def row_flops(self, sizes: Sizes, keys: int) -> int:
        """Matrix FLOPs that a query row costs a head besides its pairs, for so many keys."""
        return 0

    def refresh(
        self,
        buffers: dict[str, Tensor],
        q: Tensor,
        k: Tensor,
        valid: Tensor | None,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """New values of this part's buffers, given mapped queries (b, h, L, d) and keys (b, g, S, d)."""
        return {}

    def __str__(self) -> str:
        return call_text(self.name, self)


@functools.cache
def _hints(part: Any) -> dict[str, Any]:
    return typing.get_type_hints(part)


def check_argument(owner: str, name: str, value: Any, hint: Any, limits: Any) -> None:
    """Raise MechanismError unless `value` has the type `hint` and lies within `limits`."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    simple = tuple(t for t in allowed if t in (int, float, str, bool, type(None)))
    parts = tuple(t for t in allowed if isinstance(t, type) and issubclass(t, Part))
    if parts and isinstance(value, parts):
        return
    if parts and (not simple or isinstance(value, Part)):
        known = ", ".join(n for n, c in PARTS.items() if issubclass(c, parts))
        kind = parts[0].kind
        article = "an" if kind[0] in "aeiou" else "a"
        raise MechanismError(f"{owner}: {name} must be {article} {kind}, one of {known}, got {value}")
    several = [typing.get_args(t)[0] for t in allowed if typing.get_origin(t) is tuple]
    if several and isinstance(value, tuple):
        if not value:
            raise MechanismError(f"{owner}: {name} has a value an axis or head, got ()")
        for one in value:
            check_argument(owner, f"each of {name}", one, several[0], limits)
        return
    if several and not simple and several[0] in (int, float, bool):
        raise MechanismError(
            f"{owner}: {name} must be numbers in brackets, as in (4, 8), got {value_text(value)}"
        )
    if not simple:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right = any(
        (t is float and number)
        or (t is int and number and isinstance(value, int))
        or (t not in (int, float) and isinstance(value, t))
        for t in simple
    )
    words = " or ".join(
        {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}.get(t, "none")
        for t in simple
    )
    low, above, choices = (limits.get(x) for x in ("at_least", "above", "choices"))
    wanted = words
    if low is not None:
        wanted += f" of at least {low:g}"
    if above is not None:
        wanted += f" above {above:g}"
    if choices:
        wanted = "one of " + ", ".join(choices)
    if parts:
        wanted += f", or a {parts[0].kind}"
    finite = not (number and not math.isfinite(value))
    in_range = not number or ((low is None or value >= low) and (above is None or value > above))
    if not right or not finite or not in_range or (choices and value not in choices):
        shown = repr(value) if isinstance(value, str) else value_text(value)
        raise MechanismError(f"{owner}: {name} must be {wanted}, got {shown}")


def value_text(value: Any) -> str:
    """An argument as the text form writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "(" + ", ".join(map(value_text, value)) + ("," if len(value) == 1 else "") + ")"
    return str(value)


def call_text(name: str, part: Any) -> str:
    """`name(arguments)` with defaults left out; the first field is positional."""
    given = []
    for at, f in enumerate(f for f in fields(part) if f.init):
        value = getattr(part, f.name)
        if f.default is not MISSING and value == f.default:
            continue
        given.append(value_text(value) if at == 0 else f"{f.name}={value_text(value)}")
    return f"{name}({', '.join(given)})" if given else name
