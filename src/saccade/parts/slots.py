"""Keys that belong to no token: sinks, null keys, sentinels. They share the softmax with the real keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.parts.base import Part, Sizes, Weight
from saccade.parts.normalizer import Softmax

if TYPE_CHECKING:
    from saccade.parts.pair import Context


class Slots(Part):
    """Further entries of every row. They need a normaliser whose partial results merge."""

    kind = "slots"
    needs = frozenset({"exp"})

    def rows(self, c: Context) -> tuple[Tensor, Tensor | None]:
        """Logits, broadcastable to (b, h, L, m), and values, broadcastable to (b, h, L, m, e), or None for zeros."""
        raise NotImplementedError

    def partial(self, c: Context, like: Tensor) -> tuple[Tensor, Tensor]:
        """The slots alone as `(out, lse)`, for an output `like` (b, h, L, e)."""
        wide = torch.promote_types(like.dtype, torch.float32)
        logits, values = self.rows(c)
        logits = logits.to(wide).expand(*like.shape[:3], -1)
        weights, lse = Softmax().normalize(logits)
        if values is None:
            return torch.zeros_like(like), lse
        return (weights.unsqueeze(-1) * values.to(wide)).sum(-2).to(like.dtype), lse


@dataclass(frozen=True)
class SinkLogit(Slots):
    """One learned logit a head with a zero value: a row may attend to nothing (Miller, Attention Is Off By One, 2023)."""

    name = "sink_logit"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"sink_logit": Weight((sizes.heads,), init="zeros")}

    def rows(self, c: Context) -> tuple[Tensor, Tensor | None]:
        return c.params["sink_logit"][:, None, None], None
