"""The reading list as named constructors, by family, and the catalogue that lists all of it."""

from saccade.systems import (
    aaren,
    catalogue,
    heads,
    linear,
    luong,
    mhe,
    moba,
    neighborhood,
    nystromformer,
    pattern,
    positions,
    routing,
    softmax,
)

__all__ = [
    "aaren",
    "catalogue",
    "heads",
    "linear",
    "luong",
    "mhe",
    "moba",
    "neighborhood",
    "nystromformer",
    "pattern",
    "positions",
    "routing",
    "softmax",
]
