"""Key-value caches on a budget: what is kept, as a value, and storage that really shrinks."""

from saccade.cache import evict
from saccade.cache.bases import Bases
from saccade.cache.layer import LayerCache
from saccade.cache.packed import Packed, PackedSegments
from saccade.cache.policy import Format, Full, Phases, Policy, Sight, Stored, policy
from saccade.cache.quantized import Kivi, Oscar
from saccade.cache.segments import Segments

__all__ = [
    "Bases",
    "Format",
    "Full",
    "Kivi",
    "LayerCache",
    "Oscar",
    "Packed",
    "PackedSegments",
    "Phases",
    "Policy",
    "Segments",
    "Sight",
    "Stored",
    "evict",
    "policy",
]
