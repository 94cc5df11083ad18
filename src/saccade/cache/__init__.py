"""Key-value caches on a budget: what is kept, as a value, and storage that really shrinks."""

from saccade.cache import evict, expected
from saccade.cache.layer import LayerCache
from saccade.cache.moments import Moments, Rotation
from saccade.cache.policy import Phases, Policy, Sight, policy
from saccade.cache.premise import Premise, premise
from saccade.cache.segments import Segments

__all__ = [
    "LayerCache",
    "Moments",
    "Phases",
    "Policy",
    "Premise",
    "Rotation",
    "Segments",
    "Sight",
    "evict",
    "expected",
    "policy",
    "premise",
]
