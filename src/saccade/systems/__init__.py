"""The reading list as named constructors, by family, and the catalogue that lists all of it."""

from saccade.systems import (
    aaren,
    catalogue,
    comateformer,
    heads,
    linear,
    luong,
    moba,
    nap,
    neural_attention,
    nystromformer,
    rela,
    relaxed,
    routing,
    sentinel,
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
    "moba",
    "nap",
    "neural_attention",
    "nystromformer",
    "rela",
    "relaxed",
    "routing",
    "sentinel",
    "softmax",
    "sparse",
]
