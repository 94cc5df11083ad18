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
    """A model trained on recall, `tokens` a step: first at the shortest of `lengths`, then at all in turn."""

    lengths: tuple[int, ...]
    steps: int
    tokens: int
    pairs: int
    queries: int
    keys: int
    values: int
    dim: int
    depth: int
    heads: int
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
    Quality(tokens=131_072, length=256, batch=4, dim=64, depth=2, heads=2, learning_rate=4e-3),
    RecallRun((64, 320), 140, 2560, pairs=8, queries=48, keys=16, values=16, dim=64, depth=2, heads=1),
    Speed(lengths=(512, 2048, 4096), seconds=0.1),
)
DEFAULT = Preset(
    "default",
    (0,),
    Quality(tokens=393_216, length=512, batch=4, dim=128, depth=4, heads=4, learning_rate=3e-3),
    RecallRun((64, 320), 400, 4096, pairs=16, queries=32, keys=32, values=32, dim=64, depth=2, heads=1),
    Speed(lengths=(512, 1024, 2048, 4096, 8192), seconds=0.5),
)
LONG = Preset(
    "long",
    (0, 1, 2),
    Quality(tokens=20 * 393_216, length=512, batch=16, dim=128, depth=4, heads=4, learning_rate=1e-3),
    RecallRun(
        (64, 320, 1024), 1500, 8192, pairs=16, queries=32, keys=32, values=32, dim=64, depth=2, heads=1
    ),
    Speed(lengths=(512, 1024, 2048, 4096, 8192), seconds=0.5),
)
