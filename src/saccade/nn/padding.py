"""Padding of a layer's input, left out."""

from __future__ import annotations

import torch
from torch import Tensor


def without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, n, dim) with zeros after `lengths` (B,)."""
    if lengths is None:
        return x
    gone = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(gone.unsqueeze(-1), 0)
