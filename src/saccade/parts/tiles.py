"""A constraint that a description puts on its plan."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.parts.base import Part, arg


@dataclass(frozen=True)
class Tiles(Part):
    """Run in tiles of `query` rows by `key` keys, whatever the planner would prefer.

    The result does not depend on it; time and temporary memory do (Rabe and Staats, 2021).
    """

    query: int = arg(128, at_least=1)
    key: int = arg(512, at_least=1)

    kind = "tiles"
    name = "tiles"
