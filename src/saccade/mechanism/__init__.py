"""What is computed: mechanisms as values, their text form, and the registry of names."""

import saccade.parts.rotary  # noqa: F401
from saccade.mechanism.base import Mechanism
from saccade.mechanism.combination import ByHead, Combine, Join, Mix, causal
from saccade.mechanism.text import mechanism, names, system
from saccade.mechanism.values import Mixer, Pairwise, Recurrent

__all__ = [
    "ByHead",
    "Combine",
    "Join",
    "Mechanism",
    "Mix",
    "Mixer",
    "Pairwise",
    "Recurrent",
    "causal",
    "mechanism",
    "names",
    "system",
]
