"""A few keys that a learned score keeps for all later queries, and a window; decoding holds no other keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.mechanism import Pairwise, system
from saccade.parts.mask import Causal, Window
from saccade.parts.score import grouped_matmul
from saccade.parts.sparsek import ScoredKeys, ScoreGate, threshold


@system("sparsek", ref="S189")
def sparsek(top: int = 32, window: int = 64) -> Pairwise:
    """The last `window` keys, and of those before them the `top` that a learned score keeps, their values times a gate.

    The gates are the score's projection onto weights in [0, 1] that sum to `top`. The score is a linear form of the head's
    key and value. (Lou et al., Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers, 2024.)
    """
    return Pairwise(
        pairs=Causal() & (ScoredKeys(top, window) | Window(window)), reweight=(ScoreGate(top, window),)
    )


@dataclass(frozen=True)
class Kept:
    """The keys that `sparsek(top, window)` can still read: a window, and a heap of the `top` best before it.

    k (b, g, n, d) and v (b, g, n, e) with their scores u (b, g, n), the window last; `rest` (b, g, r) are scores, without
    keys, that still count in the threshold.
    """

    top: int
    window: int
    k: Tensor
    v: Tensor
    u: Tensor
    rest: Tensor

    @classmethod
    def empty(cls, top: int, window: int, k: Tensor, v: Tensor) -> Kept:
        """Nothing kept yet, for keys and values like k and v."""
        u = torch.promote_types(k.dtype, torch.float32)
        none = torch.empty(*k.shape[:2], 0, dtype=u, device=k.device)
        return cls(top, window, k[:, :, :0], v[:, :, :0], none, none)

    @property
    def heap(self) -> int:
        """How many keys before the window are kept."""
        return max(0, self.k.shape[2] - self.window)

    def push(self, k: Tensor, v: Tensor, scorer: Tensor) -> Kept:
        """The state after one token, k (b, g, 1, d) and v (b, g, 1, e); `scorer` is the mechanism's weight `key_scorer`."""
        wide = self.u.dtype
        score = (torch.cat((k, v), -1).to(wide) * scorer.to(wide)[:, None]).sum(-1)
        keys, values, u = (torch.cat(x, 2) for x in ((self.k, k), (self.v, v), (self.u, score)))
        if u.shape[2] <= self.window + self.top:
            return replace(self, k=keys, v=values, u=u)
        count = (
            self.top + 1
        )  # the heap, and the key that has just left the window; the earlier of equals stays
        held = u[..., :count]
        leaves = count - 1 - held.flip(-1).argmin(-1, keepdim=True)
        gone = held.gather(-1, leaves)
        stays = torch.arange(count - 1, device=k.device)
        at = stays + (stays >= leaves)

        def without(x: Tensor) -> Tensor:
            index = at if x.dim() == 3 else at.unsqueeze(-1).expand(*at.shape, x.shape[-1])
            return torch.cat((x.gather(2, index), x[:, :, count:]), 2)

        keys, values, u = (without(x) for x in (keys, values, u))
        rest = torch.cat((self.rest, gone), -1)
        tau = threshold(torch.cat((u[..., : self.top], rest), -1), self.top).unsqueeze(-1)
        rest = rest.masked_fill(rest <= tau, -torch.inf).sort(-1, descending=True).values
        rest = rest[..., : int((~torch.isneginf(rest)).sum(-1).max())]
        return replace(self, k=keys, v=values, u=u, rest=rest)

    def attend(self, q: Tensor) -> Tensor:
        """What the query of the latest token reads, q (b, h, 1, d) to (b, h, 1, e)."""
        wide = torch.promote_types(q.dtype, torch.float32)
        s = grouped_matmul(q.to(wide) * q.shape[-1] ** -0.5, self.k.to(wide).transpose(-1, -2))
        far = self.u[..., : self.heap]
        gate = torch.ones_like(self.u)
        if self.heap:
            tau = threshold(torch.cat((far, self.rest), -1), self.top).unsqueeze(-1)
            gate[..., : self.heap] = (far - tau).clamp(0, 1)
        w = torch.softmax(s, -1) * gate.repeat_interleave(q.shape[1] // gate.shape[1], 1).unsqueeze(-2)
        return grouped_matmul(w, self.v.to(wide)).to(q.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scores."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.u, self.rest))
