"""The reading list: every published system, whether it works here, where, and what was found."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from saccade.errors import MechanismError
from saccade.mechanism import names


@dataclass(frozen=True)
class Entry:
    """A row of the catalogue.

    `state` is planned or works; `where` is the mechanism's text, or the public name of a module or function, `sc.nn...`.
    """

    ref: str
    slug: str
    title: str
    name: str
    kind: str
    family: str
    about: str
    state: str
    cost: str = ""
    where: str = ""
    finding: str = ""


def public(name: str) -> Any:
    """The object of a dotted public name such as `sc.nn.Attention`. Raises AttributeError where there is none."""
    import saccade

    found: Any = saccade
    for word in name.removeprefix("sc.").split("."):
        found = getattr(found, word)
    return found


@functools.cache
def load() -> tuple[Entry, ...]:
    """All entries, in the order of the reading list."""
    text = resources.files("saccade.systems").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return tuple(Entry(**row) for row in tomllib.loads(text)["system"])


def search(words: str = "", family: str | None = None, state: str | None = None) -> list[Entry]:
    """Entries that hold every word, in any case, in their ref, slug, title, name, family or sentence."""
    wanted = words.lower().split()
    found = []
    for e in load():
        text = f"{e.ref} {e.slug} {e.title} {e.name} {e.kind} {e.family} {e.about}".lower()
        if all(w in text for w in wanted) and family in (None, e.family, e.kind) and state in (None, e.state):
            found.append(e)
    return found


def get(slug: str) -> Entry:
    """The entry of a slug or a ref. Raises MechanismError with the nearest slugs."""
    import difflib

    for e in load():
        if slug.lower() in (e.slug, e.ref.lower()):
            return e
    close = difflib.get_close_matches(slug.lower(), [e.slug for e in load()], n=4, cutoff=0.5)
    raise MechanismError(
        f"no system is called {slug!r}; nearest: {', '.join(close) or 'none, try `saccade systems WORDS`'}"
    )


def by_ref() -> dict[str, str]:
    """The registered constructor of each ref that has one."""
    return {ref: name for name, maker in names().items() if (ref := getattr(maker, "ref", None))}
