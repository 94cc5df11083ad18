"""The reading list as named constructors, by family, and the catalogue that lists all of it."""

from saccade.systems import (
    aaren,
    catalogue,
    comateformer,
    heads,
    linear,
    luong,
    mhe,
    moba,
    nap,
    neural_attention,
    nystromformer,
    positions,
    rela,
    routing,
    softmax,
    sparse,
)

__all__ = [
    "aaren",
    "catalogue",
    "comateformer",
    "heads",
    "linear",
    "luong",
    "mhe",
    "moba",
    "nap",
    "neural_attention",
    "nystromformer",
    "positions",
    "rela",
    "routing",
    "softmax",
    "sparse",
]
