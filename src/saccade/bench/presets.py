"""How much `saccade compare` trains and measures: quick, default and long."""

from __future__ import annotations

from dataclasses import dataclass

REFERENCE = "causal"
TWIN = "causal + memory_efficient_attention"
CANDIDATES = ("window(128)", "moba", "causal + performer_favor", "causal + linear", "linformer")


@dataclass(frozen=True)
class Quality:
    """A byte-level language model and the tokens that it is trained on."""

    tokens: int
    length: int
    batch: int
    dim: int
    depth: int
    heads: int
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class RecallRun:
    """A model trained on recall at all `lengths` in turn, with `tokens` a step."""

    lengths: tuple[int, ...]
    steps: int
    tokens: int
    dim: int
    depth: int
    heads: int
    pairs: int = 8
    queries: int = 32
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Speed:
    """The calls that are timed, `seconds` a cell."""

    lengths: tuple[int, ...]
    seconds: float
    batch: int = 1
    heads: int = 8
    head_dim: int = 64


@dataclass(frozen=True)
class Preset:
    """All settings of one comparison but the mechanisms, the text and the device."""

    name: str
    seeds: tuple[int, ...]
    quality: Quality
    recall: RecallRun
    speed: Speed


QUICK = Preset(
    "quick",
    (0,),
    Quality(tokens=131_072, length=256, batch=8, dim=64, depth=2, heads=2),
    RecallRun(lengths=(64, 320), steps=200, tokens=4096, dim=64, depth=2, heads=1),
    Speed(lengths=(512, 2048, 8192), seconds=0.1),
)
DEFAULT = Preset(
    "default",
    (0,),
    Quality(tokens=393_216, length=512, batch=8, dim=128, depth=4, heads=4),
    RecallRun(lengths=(64, 320), steps=400, tokens=4096, dim=64, depth=2, heads=1),
    Speed(lengths=(512, 1024, 2048, 4096, 8192), seconds=1.0),
)
LONG = Preset(
    "long",
    (0, 1, 2),
    Quality(tokens=20 * 393_216, length=512, batch=8, dim=128, depth=4, heads=4),
    RecallRun(lengths=(64, 320, 1024), steps=8000, tokens=4096, dim=64, depth=2, heads=1),
    Speed(lengths=(512, 1024, 2048, 4096, 8192), seconds=2.0),
)
