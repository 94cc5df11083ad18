"""The reading list as named constructors, by family, and the catalogue that lists all of it."""

from saccade.systems import (
    aaren,
    bam,
    catalogue,
    cope_complex,
    heads,
    linear,
    luong,
    moba,
    mvpa,
    nope_head_scale,
    nystromformer,
    positions,
    routing,
    softmax,
)

__all__ = [
    "aaren",
    "bam",
    "catalogue",
    "cope_complex",
    "heads",
    "linear",
    "luong",
    "moba",
    "mvpa",
    "nope_head_scale",
    "nystromformer",
    "positions",
    "routing",
    "softmax",
]
