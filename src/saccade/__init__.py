"""saccade: describe any attention, run it fast, drop it into a model, look inside it, measure it against the others."""

import importlib
from typing import TYPE_CHECKING, Any

from saccade import reference, systems
from saccade.cost import Shape
from saccade.errors import MechanismError, NotSupported
from saccade.mechanism import ByHead, Join, Mechanism, Mix, Pairwise, Recurrent, causal, mechanism, system
from saccade.parts.normalizer import merge
from saccade.parts.state import State
from saccade.plan import (
    Attended,
    Plan,
    Ragged,
    ReceptiveField,
    Weights,
    attend,
    attend_ragged,
    init_state,
    plan,
    receptive_field,
)

if TYPE_CHECKING:
    from saccade import cache, insight, nn, testing
    from saccade.insight import draw

__version__ = "0.1.0"

__all__ = [
    "Attended",
    "ByHead",
    "Join",
    "Mechanism",
    "MechanismError",
    "Mix",
    "NotSupported",
    "Pairwise",
    "Plan",
    "Ragged",
    "ReceptiveField",
    "Recurrent",
    "Shape",
    "State",
    "Weights",
    "attend",
    "attend_ragged",
    "cache",
    "causal",
    "draw",
    "init_state",
    "insight",
    "mechanism",
    "merge",
    "nn",
    "plan",
    "receptive_field",
    "reference",
    "system",
    "systems",
    "testing",
]


def __getattr__(name: str) -> Any:
    """Layers, caches, pictures and the contract are imported when they are first asked for."""
    if name in ("cache", "insight", "nn", "testing"):
        return importlib.import_module(f"saccade.{name}")
    if name == "draw":
        return importlib.import_module("saccade.insight").draw
    raise AttributeError(f"module 'saccade' has no attribute {name!r}")
