"""The reading list in a terminal: a table of systems, and a card of one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from rich.table import Table

from saccade.errors import MechanismError
from saccade.insight.draw import Picture, draw
from saccade.mechanism import Mechanism, mechanism, names
from saccade.systems.catalogue import Entry, public


def table(entries: Sequence[Entry]) -> Table:
    """One row a system."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("ref", "slug", "family", "state"):
        shown.add_column(head, no_wrap=True)
    shown.add_column("about")
    for e in entries:
        shown.add_row(e.ref, e.slug, e.family, e.state, e.about)
    return shown


def card(entry: Entry) -> str:
    """What a system is, what it is made of, how to call it and what was found."""
    lines = [entry.name, "=" * len(entry.name), entry.about, ""]
    made = composition(entry)
    rows = [
        ("paper", entry.title),
        ("ref", f"{entry.ref}, {entry.kind}, {entry.family}"),
        ("state", entry.state),
        ("cost", entry.cost),
        ("finding", entry.finding),
    ]
    if made is not None:
        rows[3:3] = [
            ("text", str(made)),
            ("parts", made.canonical()),
            ("call", f'sc.attend(q, k, v, "{made}")'),
        ]
    elif entry.where:
        rows.insert(3, ("call", entry.where))
    lines += [f"{name:<9}{value}" for name, value in rows if value]
    if made is not None:
        lines += ["", "formula", *(f"  {line}" for line in _formula(entry, made))]
    elif entry.where.startswith("sc."):
        lines += ["", *(inspect.getdoc(public(entry.where)) or "").splitlines()]
    if entry.state == "planned":
        lines += ["", "Planned: it cannot be called yet."]
    return "\n".join(lines)


def composition(entry: Entry) -> Mechanism | None:
    """The mechanism that an entry is called by, or None where it is planned or no mechanism."""
    if entry.state == "planned":
        return None
    for text in (entry.where, entry.slug) if not entry.where.startswith("sc.") else ():
        try:
            return mechanism(text)
        except MechanismError:
            continue
    return None


def picture(entry: Entry, length: int = 24) -> Picture | None:
    """Which keys the queries of a working mechanism read; None where that cannot be drawn."""
    made = composition(entry)
    if made is None:
        return None
    try:
        return draw(made, length)
    except (ValueError, TypeError):
        return None


def _formula(entry: Entry, made: Mechanism) -> Iterator[str]:
    """What the constructor says of itself, then what each part does, in order of evaluation."""
    said = [(entry.slug, names()[entry.slug])] if entry.slug in names() else []
    for name, source in [*said, *((str(part), type(part)) for part in made.parts())]:
        doc = inspect.getdoc(source)
        if doc:
            yield f"{name}: {' '.join(doc.splitlines()[0].split())}"
