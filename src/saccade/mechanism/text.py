"""The text form: a small language that parses to mechanisms and that mechanisms print.

sum      := pairs ("+" pairs)*            parts of one mechanism, side by side
pairs    := both ("|" both)*              union of pair sets
both     := atom ("&" atom)*              intersection
atom     := NAME [ "(" arguments ")" ] | "(" sum ")"
argument := [ NAME "=" ] ( number | true | false | none | tuple | sum )
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saccade.errors import MechanismError
from saccade.mechanism.base import Mechanism
from saccade.mechanism.combination import Combine
from saccade.mechanism.values import Mixer, Pairwise, Recurrent
from saccade.parts.algebra import Full, Pairs
from saccade.parts.base import NAMES, Part, nearest, register, value_text
from saccade.parts.tokens import TokenMap

TRUTHS = {"true": True, "false": False}
TOKEN = re.compile(
    r"\s*(?:(?P<number>-?\d+\.?\d*(?:[eE][-+]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<mark>[()+|&=,]))"
)


@dataclass(frozen=True)
class Word:
    """A name, with arguments when it was called."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    called: bool = False


@dataclass(frozen=True)
class Node:
    """A sum, a union or an intersection."""

    mark: str
    terms: tuple[Any, ...]


class Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while text[at:].strip():
            found = TOKEN.match(text, at)
            if found is None:
                self.at = len(self.tokens)
                start = at + len(text[at:]) - len(text[at:].lstrip())
                raise MechanismError(
                    f"cannot read {text!r} at character {start + 1}: {text[start]!r} is not part of the language"
                )
            self.tokens.append((str(found.lastgroup), found.group(str(found.lastgroup)), found.end()))
            at = found.end()
        self.at = 0

    def peek(self, *marks: str) -> bool:
        return (
            self.at < len(self.tokens)
            and self.tokens[self.at][1] in marks
            and self.tokens[self.at][0] == "mark"
        )

    def take(self, mark: str) -> None:
        if not self.peek(mark):
            self.fail(f"expected {mark!r}")
        self.at += 1

    def fail(self, why: str) -> typing.NoReturn:
        if self.at < len(self.tokens):
            _, word, end = self.tokens[self.at]
            where, got = f" at character {end - len(word) + 1}", repr(word)
        else:
            where, got = "", "the end"
        raise MechanismError(f"cannot read {self.text!r}{where}: {why}, found {got}")

    def whole(self) -> Any:
        if not self.tokens:
            raise MechanismError("an empty text names no mechanism; try 'causal' or 'causal + window(256)'")
        tree = self.chain("+|&")
        if self.at < len(self.tokens):
            self.fail("expected '+', '|', '&' or the end")
        return tree

    def chain(self, marks: str) -> Any:
        if not marks:
            return self.atom()
        terms = [self.chain(marks[1:])]
        while self.peek(marks[0]):
            self.at += 1
            terms.append(self.chain(marks[1:]))
        return terms[0] if len(terms) == 1 else Node(marks[0], tuple(terms))

    def atom(self) -> Any:
        if self.peek("("):
            self.take("(")
            tree = self.chain("+|&")
            self.take(")")
            return tree
        if self.at >= len(self.tokens) or self.tokens[self.at][0] != "name":
            self.fail("expected a name")
        name = self.tokens[self.at][1]
        self.at += 1
        if not self.peek("("):
            return Word(name)
        self.take("(")
        args: list[Any] = []
        kwargs: list[tuple[str, Any]] = []
        while not self.peek(")"):
            key = self.keyword()
            if key is None and kwargs:
                self.fail("an argument without a name may not follow a named one")
            value = self.value()
            if key is None:
                args.append(value)
            else:
                kwargs.append((key, value))
            if not self.peek(")"):
                self.take(",")
        self.take(")")
        return Word(name, tuple(args), tuple(kwargs), called=True)

    def keyword(self) -> str | None:
        ahead = self.tokens[self.at : self.at + 2]
        if len(ahead) == 2 and ahead[0][0] == "name" and ahead[1][1] == "=":
            self.at += 2
            return ahead[0][1]
        return None

    def plain(self, at: int) -> bool:
        """Whether a number, true or false stands at a token."""
        return at < len(self.tokens) and (self.tokens[at][0] == "number" or self.tokens[at][1] in TRUTHS)

    def value(self) -> Any:
        if self.at < len(self.tokens) and self.tokens[self.at][0] == "number":
            number = self.tokens[self.at][1]
            self.at += 1
            return int(number) if re.fullmatch(r"-?\d+", number) else float(number)
        if self.peek("(") and self.plain(self.at + 1):
            self.take("(")
            items: list[Any] = []
            while not self.peek(")"):
                if not self.plain(self.at):
                    self.fail("expected a number")
                truth = self.tokens[self.at][1]
                if truth in TRUTHS:
                    self.at += 1
                items.append(TRUTHS[truth] if truth in TRUTHS else self.value())
                if not self.peek(")"):
                    self.take(",")
            self.take(")")
            return tuple(items)
        return self.chain("+|&")


def _words(hint: Any) -> bool:
    return hint is str or (isinstance(hint, types.UnionType) and str in typing.get_args(hint))


def _argument(value: Any, hint: Any) -> Any:
    if not isinstance(value, Word | Node):
        return value
    if isinstance(value, Word) and not value.called:
        plain = {"true": True, "false": False, "none": None}
        if value.name in plain:
            return plain[value.name]
        if _words(hint):
            return value.name
    built = _build(value)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    wanted = any(inspect.isclass(k) and issubclass(k, Part) for k in kinds)
    return built if isinstance(built, Part) and wanted else _sum([built])


def _call(word: Word) -> Any:
    maker = NAMES.get(word.name)
    if maker is None:
        raise MechanismError(f"no mechanism or part is called {word.name!r}; {nearest(word.name)}")
    signature = inspect.signature(maker)
    variadic = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    hints = typing.get_type_hints(maker.__init__ if inspect.isclass(maker) else maker)
    names = [n for n, p in signature.parameters.items() if p.kind is not p.VAR_POSITIONAL]
    if variadic:
        args = [_argument(a, Mechanism) for a in word.args]
    else:
        args = [
            _argument(a, hints.get(names[n]) if n < len(names) else None) for n, a in enumerate(word.args)
        ]
    kwargs = {name: _argument(value, hints.get(name)) for name, value in word.kwargs}
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        shown = str(signature).replace("'", "").split(" ->")[0]
        raise MechanismError(f"{word.name}{shown if names else '()'}: {error}") from None
    made = maker(*bound.args, **bound.kwargs)
    if isinstance(made, Mechanism) and not isinstance(made, Combine):
        made = made.named(_system_text(word.name, signature, bound))
    return made


def _system_text(name: str, signature: inspect.Signature, bound: inspect.BoundArguments) -> str:
    given = [
        f"{key}={value_text(value)}"
        for key, value in bound.arguments.items()
        if value != signature.parameters[key].default
    ]
    return f"{name}({', '.join(given)})" if given else name


def _build(tree: Any) -> Any:
    """A Part, a pair expression or a Mechanism."""
    if isinstance(tree, Word):
        return _call(tree)
    if tree.mark == "+":
        return _sum([_build(t) for t in tree.terms])
    members = [_build(t) for t in tree.terms]
    for m in members:
        if not isinstance(m, Pairs):
            raise MechanismError(
                f"{tree.mark!r} joins pair sets such as window or causal, which {m} is not; use '+' for parts"
            )
    out = members[0]
    for m in members[1:]:
        out = out & m if tree.mark == "&" else out | m
    return out


KINDS = {
    "heads": "heads",
    "summary": "summary",
    "slots": "slots",
    "score": "score",
    "normalizer": "normalizer",
    "tiles": "tiles",
    "feature": "feature",
    "decay": "decay",
    "write": "write",
    "ratio": "ratio",
    "tokens": "tokens",
    "logits": "logits",
    "reweight": "reweight",
    "value": "value",
    "output": "output",
}
MANY = {"tokens", "logits", "reweight", "value", "output"}
STATE_ONLY = {"feature", "decay", "write", "ratio"}
SHARED = {"heads", "tokens", "output"}


def _sum(terms: list[Any]) -> Mechanism:
    """Parts and mechanisms side by side as one mechanism."""
    if len(terms) == 1 and isinstance(terms[0], Mechanism):
        return terms[0]
    fields: dict[str, Any] = {}
    source: dict[str, str] = {}
    limits: list[Pairs] = []
    allowances: list[Pairs] = []
    family: type[Pairwise] | type[Recurrent] | None = None

    def put(name: str, value: Any, word: str) -> None:
        if name in MANY:
            for part in value if isinstance(value, tuple) else (value,):
                if part in fields.get(name, ()):
                    raise MechanismError(f"{part} is given twice")
                if isinstance(part, TokenMap) and any(type(part) is type(p) for p in fields.get(name, ())):
                    raise MechanismError(f"two parts would turn the same channels: {part} twice; keep one")
                fields[name] = (*fields.get(name, ()), part)
        elif name in fields:
            raise MechanismError(
                f"two parts of kind {name}: {source[name]} and {word}; a mechanism has one, keep one of them"
            )
        else:
            fields[name], source[name] = value, word

    for term in terms:
        if isinstance(term, Pairs):
            joins = getattr(term, "joins", "or") if term.leaves() == (term,) else "and"
            (limits if joins == "and" else allowances).append(term)
        elif isinstance(term, Part):
            if term.kind not in KINDS:
                raise MechanismError(
                    f"{term} is a {term.kind}, an argument of another part, not a part of its own"
                )
            put(KINDS[term.kind], term, term.name)
        elif isinstance(term, Pairwise | Recurrent):
            own = {f.name: getattr(term, f.name) for f in dataclasses.fields(term) if f.init}
            own = {
                n: x for n, x in own.items() if x != () and x != type(term).__dataclass_fields__[n].default
            }
            if not own or own.keys() - SHARED:
                if family is not None and family is not type(term):
                    raise MechanismError(
                        f"{term} is {term.family}, the rest is {family.family}; a sum has one family, use mix(...) or by_head(...)"
                    )
                family = type(term)
            for name, value in own.items():
                if name == "pairs":
                    limits.append(value)
                else:
                    put(name, value, str(term))
        elif isinstance(term, Combine):
            raise MechanismError(
                f"{term.word}(...) is whole by itself: put the other parts inside its members"
            )
        elif isinstance(term, Mixer):
            raise MechanismError(f"{term} is no sum over pairs: it takes no parts beside it")
    if family is None:
        family = Recurrent if STATE_ONLY & fields.keys() else Pairwise
    allowed = {f.name for f in dataclasses.fields(family) if f.init}
    for name, value in fields.items():
        if name not in allowed:
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            raise MechanismError(
                f"a {family.family} mechanism has no {name}, but {shown} was given; it may have {', '.join(sorted(allowed))}"
            )
    pairs: Pairs = Full()
    for limit in limits:
        pairs = pairs & limit
    union: Pairs | None = None
    for allowance in allowances:
        union = allowance if union is None else union | allowance
    made: Mechanism = family(pairs=pairs & union if union is not None else pairs, **fields)
    return made.named(" + ".join(_term_text(t) for t in terms))


def _term_text(term: Any) -> str:
    if isinstance(term, Pairs) and term.leaves() != (term,):
        return f"({term})"
    return str(term)


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Mechanism:
    tree = Parser(text).whole()
    return _sum(
        [_build(t) for t in tree.terms] if isinstance(tree, Node) and tree.mark == "+" else [_build(tree)]
    )


def mechanism(description: str | Mechanism | Part) -> Mechanism:
    """The mechanism that a text names; a mechanism is returned as it is.

    >>> m = mechanism("kv_heads(2) + rope + window(256)")
    >>> print(m, "|", m.causal, "|", mechanism(str(m)) == m)
    kv_heads(2) + rope + window(256) | True | True

    Raises MechanismError (a ValueError) where a name is unknown, an argument is out of range, or parts exclude each
    other, and NotSupported where a causal limit meets a part that has no causal form.
    """
    if isinstance(description, Mechanism):
        return description
    if isinstance(description, Part):
        return _sum([description])
    if not isinstance(description, str):
        raise TypeError(f"a mechanism is given as text or as a value, got {type(description).__name__}")
    return _parse(description)


def system(name: str, *, ref: str) -> Callable[[Callable[..., Mechanism]], Callable[..., Mechanism]]:
    """Register a constructor as the published system `ref` of the catalogue, under `name` in the text form."""

    def enter(maker: Callable[..., Mechanism]) -> Callable[..., Mechanism]:
        signature = inspect.signature(maker)

        @functools.wraps(maker)
        def make(*args: Any, **kwargs: Any) -> Mechanism:
            bound = signature.bind(*args, **kwargs)
            return maker(*args, **kwargs).named(_system_text(name, signature, bound))

        make.ref = ref  # type: ignore[attr-defined]
        register(name, make)
        return make

    return enter


def names() -> dict[str, Callable[..., Any]]:
    """Every word of the text form, with what it makes."""
    return dict(NAMES)
