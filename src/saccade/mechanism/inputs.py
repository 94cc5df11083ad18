"""Random tensors of the kinds that a mechanism declares, for checks, timings and pictures."""

from __future__ import annotations

from typing import Any

import torch

from saccade.mechanism.base import Mechanism
from saccade.parts.base import Sizes

Named = dict[str, Any]  # params, streams and buffers of a call, by these words


def draw_named(
    m: Mechanism,
    sizes: Sizes,
    batch: int,
    tokens: int,
    generator: torch.Generator,
    *,
    off: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Named:
    """Random params, streams and buffers for so many tokens.

    Streams are uniform in 0..1, those of positions in 0..tokens. Weights are as they start plus normal noise of deviation
    `off`, without which those that start as zeros hide what they do.
    """
    streams = {
        n: torch.rand(s.shape(batch, sizes.heads, tokens), generator=generator, dtype=torch.float64)
        * (tokens if s.positions else 1)
        for n, s in m.streams(sizes).items()
    }
    params = {n: w.make(generator) for n, w in m.weights(sizes).items()}
    if off:
        params = {n: w + off * torch.randn(w.shape, generator=generator) for n, w in params.items()}
    found = {"params": params, "streams": streams, "buffers": m.buffers(sizes, generator)}
    return {kind: {n: x.to(device, dtype) for n, x in d.items()} for kind, d in found.items()}
