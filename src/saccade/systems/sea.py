"""Keys chosen by a compressed attention map that is predicted in linear time, mixed with the mean value.

Legend: b batch, h query heads, g key-value heads, L queries, S keys, m random features, K columns of the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from saccade.errors import NotSupported
from saccade.kernels import gated
from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Weight, arg
from saccade.parts.blockmap import block_map
from saccade.parts.budget import Budget, Top
from saccade.parts.feature import Favor
from saccade.parts.output import Output
from saccade.parts.select import ROWS, Choice
from saccade.parts.selection import Blocks
from saccade.parts.spread import fill

if TYPE_CHECKING:
    from saccade.parts.pair import Context

WAVES, FILTERS, TAPS = 8, 8, 3


def waves(at: Tensor, dtype: torch.dtype) -> Tensor:
    """cos and sin of positions (...) at `WAVES` rates from 1 down to 1/1000: (..., 2 WAVES)."""
    rates = torch.logspace(0, -3, WAVES, device=at.device, dtype=torch.float64)
    angle = at.double().unsqueeze(-1) * rates
    return torch.cat((angle.cos(), angle.sin()), -1).to(dtype)


@dataclass(frozen=True)
class TopColumns(Choice):
    """The `top` keys of the columns of a predicted map that score highest; a column is an equal share of the keys so far.

    Random features give each query the mean value and position that it would read; a net of two layers and a convolution
    along the columns makes the map of it, all in linear time. It learns from the loss `map`, its divergence from the dense
    map summed over columns. (Lee et al., SEA: Sparse Linear Attention with Estimated Attention Mask, 2024.)
    """

    top: int = arg(32, at_least=1)
    columns: int = arg(16, at_least=1)
    features: int = arg(32, at_least=1)
    hidden: int = arg(32, at_least=1)

    name = "top_columns"
    buffer_names = ("favor",)
    own = True

    @property
    def size(self) -> int:
        return 1

    @property
    def keep(self) -> Budget:
        return Top(self.top)

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        width = sizes.head_dim + sizes.value_dim + 4 * WAVES
        return {
            "map_in": Weight((sizes.heads, width, self.hidden), std=width**-0.5),
            "map_bias": Weight((sizes.heads, self.hidden), init="zeros"),
            "map_out": Weight((sizes.heads, self.hidden, self.columns), std=self.hidden**-0.5),
            "map_filter": Weight((FILTERS, 1, TAPS), std=TAPS**-0.5),
            "map_merge": Weight((1, FILTERS, TAPS), std=0.1),
        }

    def buffers(self, sizes: Sizes, generator: torch.Generator | None) -> dict[str, Tensor]:
        return Favor(self.features).buffers(sizes, generator)

    def flops(self, rows: int, keys: int, head_dim: int, looks_back: bool) -> int:
        m, wide = self.features, head_dim + 2 * WAVES + 1
        whole = rows == keys
        read = (
            2 * rows * (gated.CHUNK + (m if whole else 0)) * wide + 2 * rows * gated.CHUNK * m
            if looks_back
            else 2 * rows * m * wide
        )
        state = 2 * keys * m * wide
        net = 2 * self.hidden * (2 * head_dim + 4 * WAVES + self.columns) + 4 * FILTERS * TAPS * self.columns
        return 2 * (rows + keys) * m * head_dim + read + state + rows * net

    def context(self, c: Context) -> Tensor:
        """What each query would read, by random features: (b, h, L, e + 2 WAVES), float32 or wider."""
        wide = torch.promote_types(c.q.dtype, torch.float32)
        k, v = c.k.to(wide), c.v.to(wide)
        if c.valid is not None:
            k, v = (x.masked_fill(~c.valid[:, None, :, None], 0) for x in (k, v))
        feature = Favor(self.features)
        phi_q, _ = feature.map(c.q.to(wide), "q", c.query_valid, c.buffers)
        phi_k, scale = feature.map(k, "k", c.valid, c.buffers)
        assert scale is not None
        if c.valid is not None:
            scale = scale.masked_fill(~c.valid[:, None], -torch.inf)
        phi_k = phi_k * torch.exp(scale - scale.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).unsqueeze(-1)
        code = waves(c.j[:, None], wide).expand(*v.shape[:3], -1)
        v = torch.cat((v, code, torch.ones_like(v[..., :1])), -1)
        phi_k, v = (x.repeat_interleave(c.q.shape[1] // x.shape[1], 1) for x in (phi_k, v))
        if not c.looks_back:
            read = phi_q @ (phi_k.transpose(-1, -2) @ v)
        elif c.q.shape[2] == c.k.shape[2]:
            state = v.new_zeros(*v.shape[:2], self.features, v.shape[-1])
            read = gated.advance(phi_q, phi_k, v, None, None, state, None)[0]
        else:
            later = c.j[:, None, None] > c.i[:, None, :, None]
            read = (phi_q @ phi_k.transpose(-1, -2)).masked_fill(later, 0) @ v
        return read[..., :-1] / read[..., -1:].clamp_min(torch.finfo(wide).tiny)

    def predicted(self, c: Context) -> Tensor:
        """Logits of the compressed map, (b, h, L, K)."""
        read = self.context(c)
        here = waves(c.i[:, None], read.dtype).expand(*read.shape[:3], -1)
        seen = torch.cat((c.q.to(read.dtype), read, here), -1)
        into, bias, out, filters, merge = (
            c.params[f"map_{n}"].to(read.dtype) for n in ("in", "bias", "out", "filter", "merge")
        )
        s = torch.relu(seen @ into + bias[:, None]) @ out
        rows = s.reshape(-1, 1, self.columns)
        more = conv1d(torch.relu(conv1d(rows, filters, padding=TAPS // 2)), merge, padding=TAPS // 2)
        return s + more.view_as(s)

    def bounds(self, c: Context) -> tuple[Tensor, Tensor]:
        """The first key of each column and the one after its last, for every row: (b or 1, L, K)."""
        n = (
            (c.i - c.start + 1).minimum(c.key_ends[:, None])
            if c.looks_back
            else c.key_ends[:, None].expand(-1, c.q.shape[2])
        )
        edges = (
            torch.arange(self.columns + 1, device=c.q.device) * n.clamp_min(0).unsqueeze(-1) // self.columns
        )
        return edges[..., :-1], edges[..., 1:]

    @torch.no_grad()
    def choose(self, c: Context) -> Blocks:
        s, (lo, hi) = self.predicted(c), self.bounds(c)
        top = min(self.top, c.k.shape[2])
        cuts = [slice(r, r + ROWS) for r in range(0, s.shape[2], ROWS)]
        found = [fill(s[:, :, cut], lo[:, None, cut], hi[:, None, cut], top) for cut in cuts]
        index, valid = (torch.cat(x, 2) for x in zip(*found, strict=True))
        return Blocks(index, valid, 1, 1)

    def losses(self, c: Context) -> dict[str, Tensor]:
        s, (lo, hi) = self.predicted(c), self.bounds(c)
        with torch.no_grad():
            sums = pad(block_map(c, 1).mass.cumsum(-1), (1, 0))
        ends = (x[:, None].expand_as(s) for x in (hi, lo))
        truth = (sums.gather(-1, next(ends)) - sums.gather(-1, next(ends))).clamp_min(0)
        log = torch.log_softmax(s.masked_fill((lo == hi)[:, None], -torch.inf), -1)
        rows = (torch.xlogy(truth, truth) - truth * log.masked_fill(truth == 0, 0.0)).sum(-1)
        return {"map": rows.mean() if c.query_valid is None else rows.transpose(1, 2)[c.query_valid].mean()}


@dataclass(frozen=True)
class ContextMix(Output):
    """g out + (1 - g) the mean value of all keys so far, g = sigmoid(w.q + bias) a head (Lee et al., 2024: SEA)."""

    name = "context_mix"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {
            "context_mix": Weight((sizes.heads, sizes.head_dim), init="zeros"),
            "context_bias": Weight((sizes.heads,), init="ones"),
        }

    def map(self, out: Tensor, c: Context) -> Tensor:
        if c.mask is not None:
            raise NotSupported(
                "context_mix averages all keys and follows no mask of single pairs; use key_lengths for padding"
            )
        wide = torch.promote_types(out.dtype, torch.float32)
        v = c.v.to(wide) if c.valid is None else c.v.to(wide).masked_fill(~c.valid[:, None, :, None], 0)
        q = (
            c.q.to(wide)
            if c.query_valid is None
            else c.q.to(wide).masked_fill(~c.query_valid[:, None, :, None], 0)
        )
        if c.looks_back:
            count = (
                (c.i - c.start + 1).clamp(0, v.shape[2]).minimum(c.key_ends[:, None]).expand(v.shape[0], -1)
            )
            at = count[:, None, :, None].expand(*v.shape[:2], -1, v.shape[-1])
            sums = pad(v.cumsum(2), (0, 0, 1, 0)).gather(2, at)
        else:
            count, sums = c.key_ends[:, None], v.sum(2, keepdim=True)
        mean = sums / count.clamp_min(1)[:, None, :, None]
        mean = mean.repeat_interleave(out.shape[1] // mean.shape[1], 1)
        w, bias = (c.params[n].to(wide) for n in ("context_mix", "context_bias"))
        gate = torch.sigmoid((q * w[:, None]).sum(-1, keepdim=True) + bias[:, None, None])
        return (gate * out.to(wide) + (1 - gate) * mean).to(out.dtype)


@system("sea_attention", ref="S217")
def sea_attention(
    top: int = 32, columns: int = 16, features: int = 32, hidden: int = 32, mix: bool = True
) -> Pairwise:
    """Softmax over the `top` keys of each query by a map predicted in linear time, mixed with the mean value.

    The map is made row by row, so that it is causal under `causal` and decodes. (Lee et al., SEA, 2024.)
    """
    pairs = TopColumns(top, columns, features, hidden)
    return Pairwise(pairs=pairs, output=(ContextMix(),) if mix else ())
