"""Key-value caches on a budget: what is kept, as a value, and storage that really shrinks."""

from saccade.cache import evict, expected, subgen
from saccade.cache.bases import Bases
from saccade.cache.layer import LayerCache
from saccade.cache.moments import Moments, Rotation
from saccade.cache.packed import Packed, PackedSegments
from saccade.cache.policy import Format, Full, Phases, Policy, Sight, Stored, policy
from saccade.cache.premise import Premise, premise
from saccade.cache.quantized import Kivi, Oscar
from saccade.cache.segments import Segments
from saccade.cache.subgen import layer_cache

__all__ = [
    "Bases",
    "Format",
    "Full",
    "Kivi",
    "LayerCache",
    "Moments",
    "Oscar",
    "Packed",
    "PackedSegments",
    "Phases",
    "Policy",
    "Premise",
    "Rotation",
    "Segments",
    "Sight",
    "Stored",
    "evict",
    "expected",
    "layer_cache",
    "policy",
    "premise",
    "subgen",
]
