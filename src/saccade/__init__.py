"""saccade: describe any attention, run it fast, drop it into a model, look inside it, measure it against the others."""

from saccade import insight, nn, reference, systems, testing
from saccade.cost import Shape
from saccade.errors import MechanismError, NotSupported
from saccade.insight import draw
from saccade.mechanism import ByHead, Join, Mechanism, Mix, Pairwise, Recurrent, causal, mechanism, system
from saccade.parts.normalizer import merge
from saccade.parts.state import State
from saccade.plan import Attended, Plan, ReceptiveField, Weights, attend, init_state, plan, receptive_field

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
    "ReceptiveField",
    "Recurrent",
    "Shape",
    "State",
    "Weights",
    "attend",
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
