"""Linear attention that is exact inside a chunk, with a causal convolution of values, and drafts verified as a tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.nn.transformer import FeedForward
from saccade.parts.state import State

KeysValues = tuple[Tensor, Tensor]
Tree = tuple[
    list[int], list[int]
]  # tokens, and for each the place of its parent, -1 for one that follows the text


class LinearizedAttention(nn.Module):
    """norm(sum of f(q_i.k_j) v_j over the own chunk + q_i S) + causal depthwise convolution of v; x (B, n, dim) to the same.

    q and k have length one, f is relu(s)^2 or exp(s), S = sum of k_j v_j^T over the chunks before; `width` taps a channel,
    none with 0. `step` keeps S, the rows of the open chunk and width - 1 values. (You et al., When Linear Attention Meets
    Autoregressive Decoding, 2024; the norm is that of a head's root mean square, as the source leaves it open.)

    >>> LinearizedAttention(32, heads=4)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self, dim: int, heads: int, *, chunk: int = 64, width: int = 5, local: str = "relu2"
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}, both at least 1")
        if chunk < 1 or width < 0:
            raise ValueError(
                f"chunk must be at least 1 and width at least 0, got chunk={chunk} and width={width}"
            )
        if local not in ("relu2", "exp"):
            raise ValueError(f"local must be relu2 or exp, got {local!r}")
        self.heads, self.chunk, self.width, self.local = heads, chunk, width, local
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.gain = nn.Parameter(torch.ones(heads, 1, dim // heads))
        self.taps = nn.Parameter(torch.randn(heads, width, dim // heads) * max(1, width) ** -0.5)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k of length one and v, each (B, heads, n, dim / heads), float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).to(wide)
            for p in (self.query_proj, self.key_proj, self.value_proj)
        )
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v

    def _weigh(self, s: Tensor) -> Tensor:
        return s.relu().square() if self.local == "relu2" else s.exp()

    def _finish(self, mixed: Tensor, windows: list[Tensor], like: Tensor) -> Tensor:
        """The norm, the convolution of the values `back` tokens before, and the output map."""
        out = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + 1e-6) * self.gain.to(mixed.dtype)
        for back, rows in enumerate(windows):
            out = out + self.taps[:, back : back + 1].to(out.dtype) * rows
        return self.out_proj(out.transpose(1, 2).flatten(2).to(like.dtype))

    def init_state(self, batch: int) -> State:
        """The state before the first token."""
        like, d = self.gain, self.gain.shape[-1]
        wide = torch.promote_types(like.dtype, torch.float32)
        sizes = {"s": d, "k": 0, "v": 0, "tail": max(0, self.width - 1)}
        return State(
            {
                n: torch.zeros(batch, self.heads, x, d, dtype=wide, device=like.device)
                for n, x in sizes.items()
            }
        )

    def absorb(self, k: Tensor, v: Tensor, state: State) -> State:
        """The state after new keys and values (B, heads, n, d)."""
        s, tail = state.tensors["s"], torch.cat((state.tensors["tail"], v), 2)
        k, v = torch.cat((state.tensors["k"], k), 2), torch.cat((state.tensors["v"], v), 2)
        full = k.shape[2] - k.shape[2] % self.chunk
        s = s + k[:, :, :full].mT @ v[:, :, :full]
        tail = tail[:, :, tail.shape[2] - max(0, self.width - 1) :]
        count = state.length + k.shape[2] - state.tensors["k"].shape[2]
        return State({"s": s, "k": k[:, :, full:], "v": v[:, :, full:], "tail": tail}, count)

    def _advance(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """The sums of new tokens (B, heads, n, d), chunk by chunk, and the state after them."""
        outs, at = [], 0
        while at < q.shape[2]:
            held = state.tensors["k"].shape[2]
            new = slice(at, at + self.chunk - held)
            keys = torch.cat((state.tensors["k"], k[:, :, new]), 2)
            values = torch.cat((state.tensors["v"], v[:, :, new]), 2)
            rows = q[:, :, new]
            below = torch.ones(rows.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril(held)
            near = self._weigh(rows @ keys.mT).masked_fill(~below, 0)
            outs.append(near @ values + rows @ state.tensors["s"])
            state = self.absorb(k[:, :, new], v[:, :, new], state)
            at = new.stop
        return torch.cat(outs, 2) if outs else torch.zeros_like(v), state

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The mixed features; later tokens than `key_lengths` (B,) are padding."""
        gone = None
        if key_lengths is not None:
            gone = (torch.arange(x.shape[1], device=x.device) >= key_lengths[:, None]).unsqueeze(-1)
            x = x.masked_fill(gone, 0)
        return self.step(x, self.init_state(x.shape[0]))[0]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        q, k, v = self.project(x)
        self._check(state, k)
        mixed, after = self._advance(q, k, v, state)
        past, rows = torch.cat((state.tensors["tail"], v), 2), v.shape[2]
        first = past.shape[2] - rows
        windows = [past[:, :, first - back : first - back + rows] for back in range(self.width)]
        return self._finish(mixed, windows, x), after

    def _check(self, state: State, k: Tensor) -> None:
        s = state.tensors.get("s")
        wanted = (k.shape[0], self.heads, k.shape[-1], k.shape[-1])
        if s is None or tuple(s.shape) != wanted or s.dtype != k.dtype:
            shown = "no s" if s is None else f"{tuple(s.shape)} {s.dtype}"
            raise ValueError(
                f"the state should hold s {wanted} {k.dtype}, and holds {shown}; start from init_state(...)"
            )

    def tree(self, x: Tensor, parents: Sequence[int], state: State) -> tuple[Tensor, KeysValues]:
        """Drafts x (B, T, dim), each after its parent or, with -1, after the state: their features, and their keys and values.

        Every draft gets what it would get after its own ancestors alone: their keys, the chunk that they fall in, the
        values that they bring into its window. `absorb` takes the keys and values of an accepted path.
        """
        _check_parents(parents, x.shape[1])
        q, k, v = self.project(x)
        self._check(state, k)
        depths: list[int] = []
        lines: list[list[int]] = []
        for n, parent in enumerate(parents):
            lines.append([n, *(lines[parent] if parent >= 0 else [])])
            depths.append(len(lines[n]) - 1)
        chunks = (torch.tensor(depths, device=x.device) + state.length) // self.chunk
        kin = torch.zeros(len(parents), len(parents), dtype=torch.bool, device=x.device)
        for n, line in enumerate(lines):
            kin[n, line] = True
        held = state.tensors["k"].shape[2]
        own = torch.cat((chunks.new_full((held,), state.length // self.chunk), chunks))
        keys, values = torch.cat((state.tensors["k"], k), 2), torch.cat((state.tensors["v"], v), 2)
        s = q @ keys.mT
        seen = torch.cat((torch.ones(len(parents), held, dtype=torch.bool, device=x.device), kin), 1)
        w = torch.where(chunks[:, None] == own, self._weigh(s), s).masked_fill(~seen, 0)
        past = torch.cat((state.tensors["tail"], v), 2)
        kept = past.shape[2] - len(parents)
        windows = [
            past[
                :,
                :,
                [kept + line[back] if back < len(line) else kept - 1 - back + len(line) for line in lines],
            ]
            for back in range(self.width)
        ]
        return self._finish(w @ values + q @ state.tensors["s"], windows, x), (k, v)


def _check_parents(parents: Sequence[int], count: int) -> None:
    if len(parents) != count or any(not -1 <= p < n for n, p in enumerate(parents)):
        raise ValueError(
            f"each of {count} drafts names an earlier draft as its parent, or -1, got parents {list(parents)}"
        )


class LinearizedTransformer(nn.Module):
    """A causal model of `LinearizedAttention` layers: tokens (B, n) to logits (B, n, vocab); `speculate` verifies trees of drafts.

    (You et al., When Linear Attention Meets Autoregressive Decoding, 2024.)
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        *,
        chunk: int = 64,
        width: int = 5,
        local: str = "relu2",
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.layers = nn.ModuleList(
            LinearizedAttention(dim, heads, chunk=chunk, width=width, local=local) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))
        self.feed_forwards = nn.ModuleList(FeedForward(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def _through(self, tokens: Tensor, mix: Callable[[int, Tensor], Tensor]) -> Tensor:
        x = self.tokens(tokens)
        for n, feed_forward in enumerate(self.feed_forwards):
            x = x + mix(n, self.norms[2 * n](x))
            x = x + feed_forward(self.norms[2 * n + 1](x))
        return self.norm(x) @ self.tokens.weight.T

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position; later positions than `lengths` (B,) are padding."""
        return self._through(tokens, lambda n, x: self.layers[n](x, key_lengths=lengths))

    def init_state(self, batch: int) -> list[State]:
        """One state a layer, before the first token."""
        return [layer.init_state(batch) for layer in self.layers]  # type: ignore[operator]

    def step(self, tokens: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Logits of new tokens (B, n) after those that the states have seen, and the states after them."""
        after = list(states)

        def mix(n: int, x: Tensor) -> Tensor:
            out, after[n] = self.layers[n].step(x, states[n])  # type: ignore[operator]
            return out

        return self._through(tokens, mix), after

    def tree(
        self, tokens: Tensor, parents: Sequence[int], states: list[State]
    ) -> tuple[Tensor, list[KeysValues]]:
        """Logits after each draft (B, T) of a tree on top of the states, and what each layer would absorb."""
        kept: list[KeysValues] = []

        def mix(n: int, x: Tensor) -> Tensor:
            out, kv = self.layers[n].tree(x, parents, states[n])  # type: ignore[operator]
            kept.append(kv)
            return out

        return self._through(tokens, mix), kept

    @torch.no_grad()
    def speculate(
        self, prompt: Sequence[int], length: int, draft: Callable[[list[int]], Tree]
    ) -> tuple[list[int], int]:
        """`length` greedy tokens after a prompt, and how many passes over a tree they took.

        `draft` guesses from the text so far what comes next: tokens and the places of their parents, -1 where a guess
        follows the text. The longest path that agrees with the model's own choices is accepted.
        """
        if not prompt:
            raise ValueError("speculate goes on from a prompt of at least one token, got none")
        text, device = list(prompt), self.tokens.weight.device
        _, states = self.step(torch.tensor([text[:-1]], dtype=torch.long, device=device), self.init_state(1))
        passes = 0
        while len(text) < len(prompt) + length:
            guesses, parents = draft(text)
            _check_parents(parents, len(guesses))
            above = [-1, *(p + 1 for p in parents)]
            tokens = torch.tensor([[text[-1], *guesses]], device=device)
            logits, kept = self.tree(tokens, above, states)
            passes += 1
            choices, path, at = logits[0].argmax(-1).tolist(), [0], 0
            while True:
                text.append(choices[at])
                agreed = [n + 1 for n, g in enumerate(guesses) if above[n + 1] == at and g == choices[at]]
                if not agreed:
                    break
                at = agreed[0]
                path.append(at)
            states = [
                layer.absorb(k[:, :, path], v[:, :, path], s)  # type: ignore[operator]
                for layer, (k, v), s in zip(self.layers, kept, states, strict=True)
            ]
        return text[len(prompt) : len(prompt) + length], passes
