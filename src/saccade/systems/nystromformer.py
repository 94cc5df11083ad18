"""Softmax attention through landmarks: a product of three softmaxes, so a mixer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cost import Cost, Request
from saccade.mechanism import Mixer, system
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.normalizer import Softmax
from saccade.parts.pair import Context


def segment_means(x: Tensor, landmarks: int, valid: Tensor | None) -> Tensor:
    """Means of `landmarks` near-equal segments of the valid tokens of x (b, h, n, d): (b, h, m, d)."""
    b, _, n, _ = x.shape
    count = torch.full((b, 1), n, device=x.device) if valid is None else valid.sum(-1, keepdim=True)
    at = torch.arange(n, device=x.device)
    segment = torch.div(at * landmarks, count.clamp_min(1), rounding_mode="floor").clamp_max(landmarks - 1)
    member = torch.nn.functional.one_hot(segment, landmarks).to(x.dtype)
    if valid is not None:
        member, x = member * valid.unsqueeze(-1), x.masked_fill(~valid[:, None, :, None], 0)
    sizes = member.sum(1).clamp_min(1)
    return torch.einsum("bnm,bhnd->bhmd", member, x) / sizes[:, None, :, None]


def iterative_inverse(a: Tensor, iterations: int) -> Tensor:
    """An estimate of the pseudo-inverse of a (..., m, m) by a third-order iteration from a^T / (|a|_1 |a|_inf)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.transpose(-1, -2) / (a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1))[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


@dataclass(frozen=True)
class Nystrom(Mixer):
    """softmax(q k~) Z softmax(q~ k) v + convolution of v, with Z near the inverse of softmax(q~ k~)."""

    landmarks: int = arg(32, at_least=1)
    iterations: int = arg(6, at_least=1)
    taps: int = arg(33, at_least=0)

    name = "nystromformer"
    relative = "performer_favor or moba"

    __hash__ = Mixer.__hash__

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"taps": Weight((sizes.heads, self.taps), init="zeros")} if self.taps else {}

    def mix(self, c: Context) -> Tensor:
        q, k, v = self._expand(c)
        q = q / math.sqrt(q.shape[-1])
        m = min(self.landmarks, q.shape[2], k.shape[2])
        q_mean, k_mean = segment_means(q, m, c.query_valid), segment_means(k, m, c.valid)
        rows = torch.softmax(q @ k_mean.transpose(-1, -2), -1)
        middle = iterative_inverse(torch.softmax(q_mean @ k_mean.transpose(-1, -2), -1), self.iterations)
        s = q_mean @ k.transpose(-1, -2)
        if c.valid is not None:
            s = s.masked_fill(~c.valid[:, None, None], -torch.inf)
        out = rows @ (middle @ (Softmax().normalize(s)[0] @ v))
        return out + self._convolve(v, c) if self.taps else out

    def _expand(self, c: Context) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(c.q.dtype, torch.float32)
        repeat = c.q.shape[1] // c.k.shape[1]
        k, v = (x.to(wide).repeat_interleave(repeat, dim=1) if repeat > 1 else x.to(wide) for x in (c.k, c.v))
        return c.q.to(wide), k, v

    def _convolve(self, v: Tensor, c: Context) -> Tensor:
        """A depthwise convolution along the tokens, one filter a head; needs as many queries as keys."""
        b, h, n, e = v.shape
        if c.q.shape[2] != n:
            raise ValueError(
                f"the convolution of nystromformer needs as many queries as keys, got {c.q.shape[2]} and {n}; use taps=0"
            )
        flat = v.permute(0, 3, 1, 2).reshape(b * e, h, n)
        filters = c.params["taps"].to(v.dtype).unsqueeze(1)
        left = (self.taps - 1) // 2
        padded = torch.nn.functional.pad(flat, (left, self.taps - 1 - left))
        return torch.nn.functional.conv1d(padded, filters, groups=h).view(b, e, h, n).permute(0, 2, 3, 1)

    def define(self, c: Context) -> Tensor:
        q, k, v = self._expand(c)
        out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
        for b in range(q.shape[0]):
            n = k.shape[2] if c.ends is None else int(c.ends[b])
            rows = n if c.query_valid is not None else q.shape[2]
            m = min(self.landmarks, q.shape[2], k.shape[2])
            for h in range(q.shape[1]):
                qs, ks, vs = q[b, h, :rows] / math.sqrt(q.shape[-1]), k[b, h, :n], v[b, h, :n]
                members = [[t for t in range(n) if t * m // n == at] for at in range(m)]
                own = (
                    members
                    if rows == n
                    else [[t for t in range(rows) if t * m // rows == at] for at in range(m)]
                )
                ql, kl = (
                    torch.stack([x[of].sum(0) / max(1, len(of)) for of in some])
                    for x, some in ((qs, own), (ks, members))
                )
                a = torch.softmax(ql @ kl.T, -1)
                z = a.T / (a.sum(0).max() * a.sum(1).max())
                for _ in range(self.iterations):
                    y = a @ z
                    z = (13 * z - 15 * z @ y + 7 * z @ y @ y - z @ y @ y @ y) / 4
                out[b, h, :rows] = torch.softmax(qs @ kl.T, -1) @ z @ torch.softmax(ql @ ks.T, -1) @ vs
                for tap in range(self.taps):
                    shift = tap - (self.taps - 1) // 2
                    lo, hi = max(0, -shift), max(0, -shift, min(n, n - shift))
                    out[b, h, lo:hi] = (
                        out[b, h, lo:hi] + c.params["taps"][h, tap] * vs[lo + shift : hi + shift]
                    )
        return out

    def cost(self, r: Request) -> Cost:
        s = r.shape
        m = min(self.landmarks, s.length, s.keys)
        stacks = s.batch * s.heads
        means = 2 * stacks * m * (s.length + s.keys) * s.head_dim
        maps = 2 * stacks * m * (s.length + s.keys) * (s.head_dim + s.value_dim)
        inner = 2 * stacks * (self.iterations * 4 * m**3 + m * m * (s.head_dim + s.value_dim))
        conv = 2 * stacks * s.keys * self.taps * s.value_dim
        q, k, v, o = r.tensor_bytes()
        maps_bytes = stacks * m * (s.length + s.keys) * r.wide
        conv_bytes = (3 if r.grad else 5) * v * s.heads // s.kv_heads if self.taps else 0
        peak = (q + o + conv_bytes + (0 if r.item >= 4 else q + k + v)) * r.wide // r.item + 2 * maps_bytes
        if r.grad:
            peak += (q + o) * r.wide // r.item + maps_bytes
        factor = 3 if r.grad else 1
        return Cost(
            means * (2 if r.grad else 1) + (maps + inner + conv) * factor,
            (q + k + v + o) * factor + 2 * peak,
            peak,
            30 + 8 * self.iterations,
        )


@system("nystromformer", ref="S233")
def nystromformer(landmarks: int = 32, iterations: int = 6, taps: int = 33) -> Nystrom:
    """Softmax attention through `landmarks` segment means, bidirectional (Xiong et al., Nystromformer, 2021)."""
    return Nystrom(landmarks, iterations, taps)
