"""What is computed: mechanisms as values, their text form, and the registry of names."""

import saccade.parts.rotary  # noqa: F401
from saccade.mechanism.base import Mechanism
from saccade.mechanism.combination import ByHead, Combine, Join, Mix, causal
from saccade.mechanism.inputs import Named, draw_named
from saccade.mechanism.text import mechanism, names, system
from saccade.mechanism.values import Mixer, Pairwise, Recurrent

__all__ = [
    "ByHead",
    "Combine",
    "Join",
    "Mechanism",
    "Mix",
    "Mixer",
    "Named",
    "Pairwise",
    "Recurrent",
    "causal",
    "draw_named",
    "mechanism",
    "names",
    "system",
]
