"""Plans: which kernel runs a mechanism, why, at what cost; and the call that follows them."""

from saccade.plan.advance import init_state
from saccade.plan.attend import Attended, Weights, attend
from saccade.plan.choose import Plan, plan
from saccade.plan.ragged import Ragged, attend_ragged
from saccade.plan.receptive import ReceptiveField, receptive_field

__all__ = [
    "Attended",
    "Plan",
    "Ragged",
    "ReceptiveField",
    "Weights",
    "attend",
    "attend_ragged",
    "init_state",
    "plan",
    "receptive_field",
]
