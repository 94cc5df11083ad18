"""A multi-head attention layer around any mechanism."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.mechanism import Mechanism, Pairwise
from saccade.mechanism import mechanism as parse
from saccade.parts.base import Sizes, Stream
from saccade.parts.pair import Context, map_tokens
from saccade.parts.state import State
from saccade.plan import Attended, Weights, attend, init_state


class StreamNet(nn.Module):
    """What every token and head carries, from the layer's input, as a stream declares it."""

    def __init__(self, dim: int, heads: int, stream: Stream) -> None:
        super().__init__()
        self.heads, self.stream = heads, stream
        numbers, hidden = heads * (stream.width or 1), heads * stream.hidden
        self.net: nn.Module = nn.Linear(hidden or dim, numbers)
        if hidden:
            self.net = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), self.net)

    def forward(self, x: Tensor, keys: Tensor | int) -> Tensor:
        """x (B, n, dim) and the number of keys, one or (B,), to (B, heads, n) or (B, heads, n, width)."""
        raw = self.net(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        raw = raw if self.stream.width is not None else raw.squeeze(-1)
        if not self.stream.positions:
            return raw
        return raw.sigmoid() * (keys[:, None, None] if isinstance(keys, Tensor) else keys)


class Attention(nn.Module):
    """Multi-head attention by a mechanism's text: self-attention, or cross-attention when called with a context.

    x is (B, L, dim), a context (B, S, context_dim), the answer (B, L, dim). Weights and buffers that the mechanism's
    parts declare are parameters and buffers of the layer under their own names; streams are projected from the input.

    >>> layer = Attention(32, heads=4, mechanism="gqa(2) + rope + window(8)")
    >>> layer(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mechanism: str | Mechanism = "full",
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1:
            raise ValueError(f"dim and heads must be at least 1, got dim={dim} and heads={heads}")
        if head_dim is None and dim % heads:
            raise ValueError(f"dim={dim} is not divisible by heads={heads}; give head_dim")
        self.mechanism = parse(mechanism)
        width = head_dim or dim // heads
        self.sizes = Sizes(heads, self.mechanism.kv_heads(heads), width, value_dim or width)
        s = self.sizes
        learned = (
            isinstance(self.mechanism, Pairwise)
            and self.mechanism.heads is not None
            and self.mechanism.heads.learned_query
        )
        self.query_proj = None if learned else nn.Linear(dim, heads * s.head_dim, bias=bias)
        self.key_proj = nn.Linear(context_dim or dim, s.kv_heads * s.head_dim, bias=bias)
        self.value_proj = nn.Linear(context_dim or dim, s.kv_heads * s.value_dim, bias=bias)
        self.out_proj = nn.Linear(heads * s.value_dim, dim, bias=bias)
        declared = self.mechanism.weights(s)
        self.weight_names = tuple(declared)
        for name, weight in declared.items():
            self.register_parameter(name, nn.Parameter(weight.make(generator)))
        for name, buffer in self.mechanism.buffers(s, generator).items():
            self.register_buffer(name, buffer)
        self.stream_sides = {name: stream.side for name, stream in self.mechanism.streams(s).items()}
        streams = {
            n: StreamNet(dim if x.side == "q" else context_dim or dim, heads, x)
            for n, x in self.mechanism.streams(s).items()
        }
        self.streams = nn.ModuleDict(streams)

    def extra_repr(self) -> str:
        return f"mechanism={self.mechanism}, sizes={self.sizes}"

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, L, D), k (B, G, S, D) and v (B, G, S, E) of an input and a context."""
        source, s = x if context is None else context, self.sizes
        k = self.key_proj(source).unflatten(-1, (s.kv_heads, s.head_dim)).transpose(1, 2)
        v = self.value_proj(source).unflatten(-1, (s.kv_heads, s.value_dim)).transpose(1, 2)
        if self.query_proj is None:
            query = self.get_parameter("query")
            return query[None, :, None].expand(x.shape[0], -1, -1, -1).to(k.dtype), k, v
        return self.query_proj(x).unflatten(-1, (s.heads, s.head_dim)).transpose(1, 2), k, v

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        grid: Sequence[int] | None = None,
        need: Sequence[str | Weights] = ("out",),
    ) -> Tensor | Attended:
        """The mixed features (B, L, dim); with more in `need`, a named tuple whose `out` holds them."""
        q, k, v = self.project(x, context)
        keys = k.shape[2] if key_lengths is None else key_lengths
        sources = {"q": x, "k": x if context is None else context}
        found = attend(
            q,
            k,
            v,
            self.mechanism,
            mask=mask,
            key_lengths=key_lengths,
            grid=grid,
            need=need,
            params=self._params(),
            streams={n: net(sources[self.stream_sides[n]], keys) for n, net in self.streams.items()},
            buffers=self._buffers_of(),
        )
        if isinstance(found, Attended):
            return found._replace(out=self._merge(found.out))
        return self._merge(found)

    def _merge(self, out: Tensor) -> Tensor:
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _params(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(name) for name in self.weight_names}

    def _buffers_of(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self.mechanism.buffer_names()}

    def init_state(self, batch: int) -> State:
        """The state before the first token. Raises NotSupported for a mechanism that cannot decode step by step."""
        s, like = self.sizes, self.key_proj.weight
        return init_state(
            self.mechanism,
            batch,
            s.kv_heads,
            s.head_dim,
            s.value_dim,
            heads=s.heads,
            dtype=like.dtype,
            device=like.device,
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        q, k, v = self.project(x)
        keys = state.length + x.shape[1]
        found = attend(
            q,
            k,
            v,
            self.mechanism,
            state=state,
            need=("out", "state"),
            params=self._params(),
            streams={n: net(x, keys) for n, net in self.streams.items()},
            buffers=self._buffers_of(),
        )
        assert found.state is not None
        return self._merge(found.out), found.state

    @torch.no_grad()
    def refresh(
        self, x: Tensor, key_lengths: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Renew the buffers from an input (B, L, dim): move centroids, draw random features anew."""
        q, k, v = self.project(x)
        if isinstance(self.mechanism, Pairwise):
            mapped = map_tokens(self.mechanism.tokens, Context(q, k, v, params=self._params()), x.shape[1])
            q, k = mapped.q, mapped.k
        valid = (
            None if key_lengths is None else torch.arange(x.shape[1], device=x.device) < key_lengths[:, None]
        )
        for part_ in self.mechanism.parts():
            for name, fresh in part_.refresh(self._buffers_of(), q, k, valid, generator).items():
                self.get_buffer(name).copy_(fresh)
