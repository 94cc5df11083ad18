"""Blocks around short convolutions whose kernels are shares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.mechanism import mechanism
from saccade.parts.state import State
from saccade.plan import attend, init_state


def _heads(x: Tensor, count: int) -> Tensor:
    """(B, n, count * size) to (B, count, n, size)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class GatedConv(nn.Module):
    """A linear map, a gated linear unit, a convolution by softmax kernels and a linear map: x (B, n, dim) to (B, n, dim).

    The kernels of `token` taps are predicted from the gated features, `static` ones are learned. The causal form, with
    `init_state` and `step`, keeps the last width - 1 rows. (Wu et al., Pay Less Attention with Lightweight and Dynamic
    Convolutions, 2019.)

    >>> GatedConv(32, heads=4, width=3)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self, dim: int, heads: int, width: int = 7, *, taps: str = "token", causal: bool = False
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        limit = "true" if causal else "false"
        self.mechanism = mechanism(f"dynamic_conv({width}, taps={taps}, causal={limit})")
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.tap_proj = nn.Linear(dim, heads * width, bias=False) if taps == "token" else None
        self.taps = nn.Parameter(0.25 * torch.randn(heads, width)) if taps == "static" else None

    def _mix(self, x: Tensor, lengths: Tensor | None, state: State | None) -> tuple[Tensor, State | None]:
        y = F.glu(self.in_proj(x))
        v = _heads(y, self.heads)
        found = attend(
            v,
            v,
            v,
            self.mechanism,
            key_lengths=lengths,
            state=state,
            need=("out",) if state is None else ("out", "state"),
            params={} if self.taps is None else {"taps": self.taps},
            streams={} if self.tap_proj is None else {"taps": _heads(self.tap_proj(y), self.heads)},
        )
        out, after = (found, None) if isinstance(found, Tensor) else (found.out, found.state)
        return self.out_proj(out.transpose(1, 2).flatten(2)), after

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding."""
        return self._mix(x, key_lengths, None)[0]

    def init_state(self, batch: int) -> State:
        """The state before the first token. Raises NotSupported where the block looks ahead."""
        like, size = self.out_proj.weight, self.out_proj.weight.shape[0] // self.heads
        return init_state(self.mechanism, batch, self.heads, size, dtype=like.dtype, device=like.device)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        out, after = self._mix(x, None, state)
        assert after is not None
        return out, after


class SpanConvAttention(nn.Module):
    """Attention heads beside heads of a convolution whose kernel the span around a token decides; x (B, n, dim) to the same.

    Both halves have heads // ratio heads in dim // ratio features and share their queries. The span key is a depthwise
    convolution of x over `span` tokens, then a linear map; the kernel of a token and head is the softmax of a linear map of
    query times span key, and mixes `width` values around the token. (Jiang et al., ConvBERT: Improving BERT with Span-based
    Dynamic Convolution, 2020.)

    >>> SpanConvAttention(32, heads=4)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self, dim: int, heads: int, *, ratio: int = 2, width: int = 9, span: int | None = None
    ) -> None:
        super().__init__()
        span = width if span is None else span
        if dim < 1 or heads < 1 or ratio < 1 or heads % ratio or dim % heads:
            raise ValueError(
                f"dim={dim} must be a multiple of heads={heads}, and heads of ratio={ratio}, all at least 1"
            )
        if span < 1 or span % 2 == 0:
            raise ValueError(f"span must be an odd number of tokens of at least 1, got {span}")
        self.mechanism = mechanism(f"dynamic_conv({width})")
        self.heads, own = heads // ratio, dim // ratio
        self.query_proj, self.key_proj, self.value_proj = (nn.Linear(dim, own) for _ in range(3))
        self.span_conv = nn.Conv1d(dim, dim, span, padding=span // 2, groups=dim, bias=False)
        self.span_proj, self.conv_value_proj = nn.Linear(dim, own), nn.Linear(dim, own)
        self.tap_proj = nn.Linear(own, self.heads * width)
        self.out_proj = nn.Linear(2 * own, dim)

    def taps(self, x: Tensor) -> Tensor:
        """What the softmax over taps is taken of, (B, heads, n, width), for tokens (B, n, dim) whose padding is zero."""
        span = self.span_proj(self.span_conv(x.mT).mT)
        return _heads(self.tap_proj(self.query_proj(x) * span), self.heads)

    def convolve(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """The convolution's half, (B, heads, n, size)."""
        v = _heads(self.conv_value_proj(x), self.heads)
        return attend(v, v, v, self.mechanism, key_lengths=key_lengths, streams={"taps": self.taps(x)})

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding."""
        if key_lengths is not None:
            gone = torch.arange(x.shape[1], device=x.device) >= key_lengths[:, None]
            x = x.masked_fill(gone.unsqueeze(-1), 0)
        q, k, v = (_heads(p(x), self.heads) for p in (self.query_proj, self.key_proj, self.value_proj))
        read = attend(q, k, v, "full", key_lengths=key_lengths)
        both = torch.cat((read, self.convolve(x, key_lengths)), 1)
        return self.out_proj(both.transpose(1, 2).flatten(2))
