"""Plans: which kernel runs a mechanism, why, at what cost; and the call that follows them."""

from saccade.plan.advance import init_state
from saccade.plan.attend import Attended, Weights, attend
from saccade.plan.choose import Plan, plan
from saccade.plan.receptive import ReceptiveField, receptive_field

__all__ = ["Attended", "Plan", "ReceptiveField", "Weights", "attend", "init_state", "plan", "receptive_field"]
