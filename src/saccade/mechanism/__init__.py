"""What is computed: mechanisms as values, their text form, and the registry of names."""

import saccade.parts.rotary  # noqa: F401
from saccade.mechanism.text import mechanism, system
from saccade.mechanism.values import (
    ByHead,
    Combine,
    Join,
    Mechanism,
    Mix,
    Mixer,
    Pairwise,
    Recurrent,
    causal,
    names,
)

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
