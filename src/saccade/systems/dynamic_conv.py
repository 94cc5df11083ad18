"""Short convolutions whose kernels are shares: learned ones, or ones predicted token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.cost import Cost, Request
from saccade.errors import MechanismError
from saccade.mechanism import Mixer, system
from saccade.parts.base import Causality, Sizes, Stream, Weight, arg
from saccade.parts.heads import INPUT, NONE
from saccade.parts.pair import Context
from saccade.parts.tokens import On


@dataclass(frozen=True)
class DynamicConv(Mixer):
    """out_i = sum_t softmax(taps)_t v_{i + t - before} over `width` taps, one kernel a head; zeros stand beyond the ends.

    `before` is width - 1 in the causal form, else half of it. `static` taps are a weight (H, width), those of a `token` a
    stream (B, H, n, width), which a layer projects from its input. (Wu et al., Pay Less Attention with Lightweight and
    Dynamic Convolutions, 2019.)
    """

    width: int = arg(7, at_least=1)
    taps: str = arg("token", choices=("token", "static"))
    causal: bool = False

    name = "dynamic_conv"
    relative = "the same with causal=true"
    keeps = ("v",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal and self.width % 2 == 0:
            raise MechanismError(
                f"{self.name}: taps on both sides of a token are an odd number, got width {self.width}; "
                "take an odd one or causal=true"
            )

    __hash__ = Mixer.__hash__

    @property
    def causality(self) -> Causality:
        return "safe"

    @property
    def before(self) -> int:
        """Taps to the left of a token's own."""
        return self.width - 1 if self.causal else self.width // 2

    @property
    def horizon(self) -> int:
        return self.before + 1

    def causal_form(self) -> DynamicConv:
        return dataclasses.replace(self, causal=True)

    def source(self, on: On) -> str:
        return INPUT if on == "v" else NONE

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"taps": Weight((sizes.heads, self.width), std=0.25)} if self.taps == "static" else {}

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"taps": Stream("q", width=self.width)} if self.taps == "token" else {}

    def logits(self, c: Context) -> Tensor:
        """What the softmax over taps is taken of, (B or 1, H, L or 1, width)."""
        return c.streams["taps"] if self.taps == "token" else c.params["taps"][None, :, None]

    def mix(self, c: Context) -> Tensor:
        wide = torch.promote_types(c.v.dtype, torch.float32)
        w = torch.softmax(self.logits(c).to(wide), -1)
        v = c.v.to(wide).repeat_interleave(c.q.shape[1] // c.v.shape[1], 1)
        out = v.new_zeros(*c.q.shape[:3], v.shape[-1])
        for tap, rows in enumerate(self._windows(v, c)):
            out = torch.addcmul(out, w[..., tap, None], rows)
        return out

    def _windows(self, v: Tensor, c: Context) -> Iterator[Tensor]:
        """For each tap the value under it, (B, H, L, E), zeros beyond the ends."""
        rows = c.q.shape[2]
        if c.offset is None:
            at = c.i[:, None, :, None] - self.before
            for tap in range(self.width):
                there = ((at + tap >= 0) & (at + tap < v.shape[2])).to(v.dtype)
                index = (at + tap).clamp(0, v.shape[2] - 1).expand(-1, v.shape[1], -1, v.shape[3])
                yield v.gather(2, index) * there
            return
        first = c.offset - c.start - self.before
        last = first + self.width - 1 + rows
        around = pad(v[:, :, max(0, first) :], (0, 0, max(0, -first), max(0, last - v.shape[2])))
        for tap in range(self.width):
            yield around[:, :, tap : tap + rows]

    def define(self, c: Context) -> Tensor:
        repeat, left = c.q.shape[1] // c.v.shape[1], self.before
        share = self.logits(c).exp()
        share = share.expand(c.q.shape[0], -1, c.q.shape[2], -1)
        samples = []
        for b, ends in enumerate(c.key_ends.expand(c.q.shape[0]).tolist()):
            v, rows = c.v[b].repeat_interleave(repeat, 0), []
            for r, i in enumerate(c.i.expand(c.q.shape[0], -1)[b].tolist()):
                row = v.new_zeros(v.shape[0], v.shape[-1])
                for t in range(self.width):
                    j = i + t - left - c.start
                    if 0 <= j < ends:
                        row = row + (share[b, :, r, t] / share[b, :, r].sum(-1))[:, None] * v[:, j]
                rows.append(row)
            samples.append(torch.stack(rows, 1))
        return torch.stack(samples)

    def cost(self, r: Request) -> Cost:
        """No matrix products: each tap passes over the values once."""
        s = r.shape
        row = s.batch * s.heads * r.wide
        kernels = row * s.length * self.width
        passes = row * s.value_dim * (s.keys + self.width + (2 if r.grad else 3) * s.length)
        moved = row * s.value_dim * 3 * s.length * self.width
        factor = 3 if r.grad else 1
        return Cost(0, (moved + kernels) * factor, 2 * kernels + passes, 4 + self.width * factor)


@system("dynamic_conv", ref="S228")
def dynamic_conv(width: int = 7, taps: str = "token", causal: bool = False) -> DynamicConv:
    """A convolution over nearby values by softmax kernels a head, of the `token` or `static`; `causal` looks back alone.

    (Wu et al., Pay Less Attention with Lightweight and Dynamic Convolutions, 2019.)
    """
    return DynamicConv(width, taps, causal)
