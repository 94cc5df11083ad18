"""Attention to a window and to the best keys of a memory, trained among the memories of other documents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.nn.eviction import Fifo, KeyValueMemory, pieces
from saccade.nn.padding import without_padding
from saccade.parts.normalizer import merge
from saccade.parts.pair import Context
from saccade.parts.tokens import On, Rope
from saccade.plan import attend


def crossbatch(x: Tensor, documents: int) -> Tensor:
    """Each sample's tokens, then those of the next documents - 1 samples: x (B, H, n, d) to (B, H, documents * n, d).

    (Tworkowski et al., Focused Transformer: Contrastive Training for Context Scaling, 2023.)
    """
    if not 1 <= documents <= len(x):
        raise ValueError(f"crossbatch: a batch of {len(x)} has 1 to {len(x)} documents, got {documents}")
    return torch.cat([x.roll(-n, 0) for n in range(documents)], 2)


class FocusedAttention(nn.Module):
    """One softmax over the causal keys of the own window, with rope, and the `top` best keys of a memory, without positions.

    The memory holds the keys of all earlier windows, or the latest `size` of them; without `top` all are read. In training,
    `forward(x, documents=d)` reads instead the window before, of the own document and of d - 1 others in the batch, so that
    keys learn to tell documents apart; gradients reach all of them. x is (B, n, dim), the answer (B, n, dim). (Tworkowski
    et al., Focused Transformer: Contrastive Training for Context Scaling, 2023.)

    >>> FocusedAttention(32, heads=4, window=8, top=4)(torch.zeros(1, 50, 32)).shape
    torch.Size([1, 50, 32])
    """

    def __init__(
        self, dim: int, heads: int, *, window: int = 64, top: int | None = None, size: int | None = None
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % (2 * heads):
            raise ValueError(
                f"dim={dim} must be a multiple of twice heads={heads}, for rope turns pairs of channels"
            )
        for name, given in (("window", window), ("top", top), ("size", size)):
            if given is not None and given < 1:
                raise ValueError(f"{name} must be at least 1, got {given}")
        self.heads, self.window, self.top, self.size = heads, window, top, size
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, H, n, d) without positions."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def read(self, q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor) -> Tensor:
        """What the last queries of a window find in it and in a memory: (B, H, L, d) of (B, H, n, d) and (B, H, M, d)."""
        at, first = torch.arange(k.shape[2], device=k.device)[None], k.shape[2] - q.shape[2]
        near = attend(_turn(q, at[:, first:], "q"), _turn(k, at, "k"), v, "causal", need=("out", "lse"))
        text = "full" if self.top is None else f"top_keys({self.top})"
        far = attend(q, memory_k, memory_v, text, need=("out", "lse"))
        assert near.lse is not None
        assert far.lse is not None
        return merge([(near.out, near.lse), (far.out, far.lse)])[0]

    def forward(
        self, x: Tensor, *, documents: int | None = None, key_lengths: Tensor | None = None
    ) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding, which `documents` does not take."""
        if documents is not None:
            if key_lengths is not None:
                raise ValueError(
                    "documents read each other's windows, so they take no padding: cut them to one length"
                )
            return self._among(x, documents)
        if key_lengths is None:
            return self.step(x, self.init_state(len(x)))[0]
        return without_padding(self.forward(without_padding(x, key_lengths)), key_lengths)

    def _among(self, x: Tensor, documents: int) -> Tensor:
        """The features where the memory is the window before, of several documents."""
        q, k, v = self.project(x)
        outs = []
        for cut in pieces(0, x.shape[1], self.window):
            before = slice(max(0, cut.start - self.window), cut.start)
            memory = [crossbatch(y[:, :, before], documents) for y in (k, v)]
            outs.append(self.read(*(y[:, :, cut] for y in (q, k, v)), *memory))
        return self._merged(outs, v)

    def _merged(self, outs: list[Tensor], v: Tensor) -> Tensor:
        return self.out_proj(torch.cat([v[:, :, :0], *outs], 2).transpose(1, 2).flatten(2))

    def init_state(self, batch: int) -> KeyValueMemory:
        """The memory before the first token."""
        like, size = self.out_proj.weight, self.out_proj.weight.shape[0] // self.heads
        none = like.new_zeros(batch, self.heads, 0, size)
        return KeyValueMemory.empty(none, none)

    def step(self, x: Tensor, state: KeyValueMemory) -> tuple[Tensor, KeyValueMemory]:
        """New tokens x (B, n, dim), usually one, and the memory before them, to their features and the memory after.

        The memory holds the keys of the window that is not yet full at its end.
        """
        q, k, v = self.project(x)
        outs = []
        for cut in pieces(state.length, x.shape[1], self.window):
            old = state.size - state.length % self.window
            state = state.append(k[:, :, cut], v[:, :, cut], Fifo())
            own, far = slice(old, None), slice(0, old)
            outs.append(
                self.read(
                    q[:, :, cut],
                    *(y[:, :, part] for part in (own, far) for y in (state.k, state.v)),
                )
            )
            if self.size is not None and state.length % self.window == 0:
                state = state.keep(self.size)
        return self._merged(outs, v), state


def _turn(x: Tensor, positions: Tensor, on: On) -> Tensor:
    return Rope().map(x, positions, on, Context(x, x, x))
