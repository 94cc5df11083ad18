"""Tokens mixed by a learned triangular matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.errors import NotSupported
from saccade.mechanism import Mixer, system
from saccade.parts.base import Causality, Sizes, Weight, arg
from saccade.parts.heads import INPUT, NONE
from saccade.parts.pair import Context
from saccade.parts.tokens import On


@dataclass(frozen=True)
class MaskedMixer(Mixer):
    """out = tril(W) v with a learned matrix (length, length) a head: no queries, no keys, and no text beyond `length` tokens.

    (Badger, Masked Mixers for Language Generation and Retrieval, 2024.)
    """

    length: int = arg(512, at_least=1)

    name = "masked_mixer"
    keeps = ("v",)

    __hash__ = Mixer.__hash__

    @property
    def causal(self) -> bool:
        return True

    @property
    def causality(self) -> Causality:
        return "safe"

    def causal_form(self) -> MaskedMixer:
        return self

    def source(self, on: On) -> str:
        return INPUT if on == "v" else NONE

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"mixing": Weight((sizes.heads, self.length, self.length), std=0.02)}

    def _check(self, last: int) -> None:
        if last > self.length:
            raise NotSupported(
                f"{self} mixes {self.length} tokens at most, got {last}: give it a greater length before training, or use "
                "a mechanism without a fixed context, such as dynamic_conv"
            )

    def mix(self, c: Context) -> Tensor:
        self._check(c.v.shape[2])
        wide = torch.promote_types(c.v.dtype, torch.float32)
        v = c.v.to(wide).repeat_interleave(c.q.shape[1] // c.v.shape[1], 1)
        rows, w = c.i.clamp_min(0), c.params["mixing"].to(wide).tril()[..., : v.shape[2]]
        if len(rows) == 1:
            return w[:, int(rows[0, 0]) :][:, : rows.shape[1]] @ v
        own = w[:, rows].transpose(0, 1)
        return own.masked_fill((c.i < 0)[:, None, :, None], 0) @ v

    def define(self, c: Context) -> Tensor:
        self._check(c.v.shape[2])
        repeat, n = c.q.shape[1] // c.v.shape[1], c.v.shape[2]
        w = c.params["mixing"][:, :n, :n]
        samples = []
        for b, end in enumerate(c.key_ends.expand(c.q.shape[0]).tolist()):
            v = c.v[b].repeat_interleave(repeat, 0)[:, :end]
            rows = []
            for i in c.i.expand(c.q.shape[0], -1)[b].tolist():
                past = max(0, min(i + 1, end))
                rows.append((w[:, i, None, :past] @ v[:, :past])[:, 0])
            samples.append(torch.stack(rows, 1))
        return torch.stack(samples)

    def cost(self, r: Request) -> Cost:
        s = r.shape
        flops = 2 * s.batch * s.heads * s.length * s.keys * s.value_dim
        _, _, v, o = r.tensor_bytes()
        matrix = s.heads * self.length * self.length * r.wide
        wide = (v * s.heads // s.kv_heads + o) * r.wide // r.item
        factor = 3 if r.grad else 1
        return Cost(
            flops * factor, factor * (2 * matrix + 2 * wide), matrix * (2 if r.grad else 1) + 2 * wide, 4
        )


@system("masked_mixer", ref="S190")
def masked_mixer(length: int = 512) -> MaskedMixer:
    """Values mixed by a learned lower-triangular matrix of a fixed size (Badger, Masked Mixers for Language Generation, 2024)."""
    return MaskedMixer(length)
