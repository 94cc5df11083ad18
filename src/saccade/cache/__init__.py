"""Key-value caches on a budget: what is kept, as a value, and storage that really shrinks."""

from saccade.cache import evict, expected, subgen
from saccade.cache.layer import LayerCache
from saccade.cache.moments import Moments, Rotation
from saccade.cache.policy import Phases, Policy, Sight, policy
from saccade.cache.premise import Premise, premise
from saccade.cache.segments import Segments
from saccade.cache.subgen import layer_cache

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
    "layer_cache",
    "policy",
    "premise",
    "subgen",
]
