"""A multi-head attention layer around any mechanism."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.mechanism import Mechanism, Pairwise
from saccade.mechanism import mechanism as parse
from saccade.parts.base import Sizes, Stream
from saccade.parts.heads import INPUT, LEARNED, NONE, SLICE
from saccade.parts.pair import Context, map_tokens
from saccade.parts.state import State
from saccade.parts.tokens import On
from saccade.plan import Attended, Weights, attend, init_state

KeysValues = tuple[Tensor, Tensor]


class StreamNet(nn.Module):
    """What every token and head carries, from the layer's input, as a stream declares it."""

    def __init__(self, dim: int, heads: int, stream: Stream) -> None:
        super().__init__()
        self.heads, self.stream = heads if stream.per_head else 1, stream
        numbers, hidden = self.heads * (stream.width or 1), self.heads * stream.hidden
        last = nn.Linear(hidden or dim, numbers)
        if stream.start is not None:
            last.bias = nn.Parameter(torch.linspace(*stream.start, numbers))
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), last) if hidden else last

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
    Where the mechanism names a source for q, k or v, the call brings it in `sources`, (B or 1, n, width), with the width
    in `source_dims`, or dim. A layer that borrows makes no keys and values: each call brings those of another layer's
    `keys_values` as `kv`.

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
        source_dims: dict[str, int] | None = None,
        borrows: bool = False,
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
        self.source_names: dict[On, str] = {on: self.mechanism.source(on) for on in ("q", "k", "v")}
        named = set(self.source_names.values()) - {INPUT, SLICE, LEARNED, NONE}
        if set(source_dims or {}) - named:
            raise ValueError(
                f"source_dims names {', '.join(sorted(source_dims or {}))}; {self.mechanism} has the sources "
                f"{', '.join(sorted(named)) or 'none but its input'}"
            )
        widths = dict.fromkeys((INPUT, SLICE), context_dim or dim)
        widths |= dict.fromkeys(named, dim) | (source_dims or {})

        def linear(on: On, heads: int, size: int, width: int) -> nn.Linear | None:
            source = self.source_names[on]
            if source == SLICE and heads * size != width:
                raise ValueError(
                    f"{on} is a slice of {width} features, which {heads} heads of {size} do not cover"
                )
            made_elsewhere = source in (SLICE, LEARNED, NONE) or (borrows and on != "q")
            return None if made_elsewhere else nn.Linear(width, heads * size, bias=bias)

        own = widths | dict.fromkeys((INPUT, SLICE, LEARNED, NONE), dim)
        widths |= {NONE: dim}
        self.borrows = borrows
        self.query_heads = self.mechanism.query_heads(heads)
        self.query_proj = linear("q", self.query_heads, s.head_dim, own[self.source_names["q"]])
        self.key_proj = linear("k", s.kv_heads, s.head_dim, widths[self.source_names["k"]])
        self.value_proj = linear("v", s.kv_heads, s.value_dim, widths[self.source_names["v"]])
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

    def project(
        self,
        x: Tensor,
        context: Tensor | None = None,
        sources: dict[str, Tensor] | None = None,
        kv: KeysValues | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, L, D), k (B, G, S, D) and v (B, G, S, E) of an input, a context and named sources; k and v may be given."""
        self._check_sources(sources or {}, ("q",) if kv is not None else ("q", "k", "v"))
        k, v = self._keys_values(x, context, sources or {}) if kv is None else kv
        s = self.sizes
        if self.source_names["q"] == LEARNED:
            query = self.get_parameter("query")
            rows = query[:, None] if query.dim() == 2 else query
            return rows[None].expand(x.shape[0], -1, -1, -1).to(k.dtype), k, v
        if self.source_names["q"] == NONE:
            return v.repeat_interleave(s.heads // s.kv_heads, 1), k, v
        q = self._heads("q", self.query_proj, x, x.shape[0], self.query_heads, sources or {})
        return q if self.query_heads == s.heads else q.repeat_interleave(s.heads // self.query_heads, 1), k, v

    def keys_values(
        self, x: Tensor, context: Tensor | None = None, sources: dict[str, Tensor] | None = None
    ) -> KeysValues:
        """k (B, G, S, D) and v (B, G, S, E) of an input, for this layer and for those that borrow them."""
        self._check_sources(sources or {}, ("k", "v"))
        return self._keys_values(x, context, sources or {})

    def _keys_values(self, x: Tensor, context: Tensor | None, sources: dict[str, Tensor]) -> KeysValues:
        if self.borrows:
            raise ValueError(
                "this layer borrows its keys and values: call it with kv=owner.keys_values(...) of the layer that has them"
            )
        own, count = x if context is None else context, self.sizes.kv_heads
        v = self._heads("v", self.value_proj, own, x.shape[0], count, sources)
        if self.source_names["k"] == NONE:
            return v, v
        return self._heads("k", self.key_proj, own, x.shape[0], count, sources), v

    def _heads(
        self, on: On, net: nn.Linear | None, own: Tensor, batch: int, count: int, sources: dict[str, Tensor]
    ) -> Tensor:
        """`count` heads (batch, count, n, size) of the source of q, k or v."""
        tensor = sources.get(self.source_names[on], own)
        if tensor.dim() != 3 or tensor.shape[0] not in (1, batch):
            raise ValueError(
                f"the source {self.source_names[on]} of {on} must be ({batch} or 1, tokens, width), got {tuple(tensor.shape)}"
            )
        made = tensor if net is None else net(tensor)
        return made.unflatten(-1, (count, -1)).transpose(1, 2).expand(batch, -1, -1, -1)

    def _check_sources(self, given: dict[str, Tensor], sides: tuple[On, ...]) -> None:
        wanted = dict.fromkeys(
            name for on in sides if (name := self.source_names[on]) not in (INPUT, SLICE, LEARNED, NONE)
        )
        if given.keys() != wanted.keys():
            raise ValueError(
                f"{self.mechanism} takes sources={{...}} with {', '.join(wanted) or 'nothing'}, "
                f"got {', '.join(given) or 'none'}"
            )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        sources: dict[str, Tensor] | None = None,
        kv: KeysValues | None = None,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        grid: Sequence[int] | None = None,
        need: Sequence[str | Weights] = ("out",),
    ) -> Tensor | Attended:
        """The mixed features (B, L, dim); with more in `need`, a named tuple whose `out` holds them."""
        q, k, v = self.project(x, context, sources, kv)
        keys = k.shape[2] if key_lengths is None else key_lengths
        sides = {"q": x, "k": x if context is None else context}
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
            streams={n: net(sides[self.stream_sides[n]], keys) for n, net in self.streams.items()},
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
        s, like = self.sizes, self.out_proj.weight
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

    def step(
        self,
        x: Tensor,
        state: State,
        *,
        sources: dict[str, Tensor] | None = None,
        kv: KeysValues | None = None,
    ) -> tuple[Tensor, State]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after.

        `sources` and `kv` are those of the new tokens.
        """
        q, k, v = self.project(x, sources=sources, kv=kv)
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
        self,
        x: Tensor,
        key_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        sources: dict[str, Tensor] | None = None,
    ) -> None:
        """Renew the buffers from an input (B, L, dim): move centroids, draw random features anew."""
        q, k, v = self.project(x, sources=sources)
        if isinstance(self.mechanism, Pairwise):
            mapped = map_tokens(self.mechanism.tokens, Context(q, k, v, params=self._params()), x.shape[1])
            q, k = mapped.q, mapped.k
        valid = (
            None if key_lengths is None else torch.arange(x.shape[1], device=x.device) < key_lengths[:, None]
        )
        for part_ in self.mechanism.parts():
            for name, fresh in part_.refresh(self._buffers_of(), q, k, valid, generator).items():
                self.get_buffer(name).copy_(fresh)
