"""Which parts go together: every pair of them tried, with the reason where they exclude each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from saccade.errors import MechanismError, NotSupported
from saccade.mechanism.text import KINDS, mechanism
from saccade.parts.base import PARTS, call_text

_SMALL = (2, 3, (2, 3))  # every range in use admits one of them: some widths are odd, some parts list lengths
_HELP = (
    "causal",
    "additive",
    "elu1",
    "causal + elu1",
    "ratio",
    "causal + ratio",
)  # what a part may need besides


def example(name: str) -> str:
    """The text of a part with its defaults, and small numbers where it has none."""
    cls = PARTS[name]
    required = [f for f in dataclasses.fields(cls) if f.init and f.default is dataclasses.MISSING]
    for value in _SMALL:
        try:
            return call_text(name, cls(**{f.name: value for f in required}))
        except MechanismError as error:
            last = error
    raise last


def words() -> list[str]:
    """Names of the parts that stand in a sum, by kind in order of evaluation."""
    order = ["pairs", *KINDS]
    placed = [(order.index(cls.kind), name) for name, cls in PARTS.items() if cls.kind in order]
    return [name for _, name in sorted(placed)]


def refusal(*texts: str) -> str | None:
    """Why the texts cannot stand in one sum; None where they can."""
    try:
        mechanism(" + ".join(texts))
    except (MechanismError, NotSupported) as error:
        return str(error)
    return None


def legal(name: str) -> str:
    """The shortest legal text that holds a part. Raises MechanismError where none was found."""
    text = example(name)
    for other in ("", *_HELP):
        if refusal(*filter(None, (other, text))) is None:
            return " + ".join(filter(None, (other, text)))
    raise MechanismError(f"{text} stands in no sum: {refusal(text)}")


@dataclasses.dataclass(frozen=True)
class Together:
    """Two parts: whether they go together at once, with a third part (`help`), or not, and then why."""

    a: str
    b: str
    legal: bool
    help: str = ""
    reason: str = ""


def together(a: str, b: str) -> Together:
    """What becomes of two parts, by name, in one mechanism."""
    texts = [example(a), example(b)]
    reason = refusal(*texts)
    if reason is None:
        return Together(a, b, True)
    for other in _HELP:
        if refusal(*texts, other) is None:
            return Together(a, b, True, help=other)
    return Together(a, b, False, reason=reason)


def table() -> Iterator[str]:
    """The legal matrix as lines of text: a mark for each part against all before it."""
    names = words()
    width = max(map(len, names))
    yield f"{'':{width + 4}}{''.join(str(n % 10) for n in range(1, len(names) + 1))}"
    for n, a in enumerate(names):
        found = [together(b, a) for b in names[:n]]
        marks = "".join("+" if t.legal and t.help else "#" if t.legal else "." for t in found)
        yield f"{n + 1:3} {a:{width}}{marks}  {PARTS[a].kind}"
