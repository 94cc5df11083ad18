"""A small pre-norm Transformer: decoder, encoder, encoder-decoder. Any mechanism goes in by its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.mechanism import Mechanism, causal
from saccade.mechanism import mechanism as parse
from saccade.nn.attention import Attention, KeysValues
from saccade.nn.positions import position_vectors
from saccade.parts.state import State


class FeedForward(nn.Sequential):
    """Two linear maps around a GELU, `ratio` times as wide inside."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


class Block(nn.Module):
    """x + attention(norm x), with cross-attention between when asked, then x + feed-forward(norm x)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mechanism: Mechanism,
        cross: Mechanism | None = None,
        borrows: bool = False,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.borrows = borrows
        value_dim = None if head_dim is None else dim // heads
        self.attention = Attention(
            dim, heads, mechanism, head_dim=head_dim, value_dim=value_dim, borrows=borrows
        )
        self.cross_norm = nn.LayerNorm(dim) if cross is not None else None
        self.cross = Attention(dim, heads, cross) if cross is not None else None
        self.feed_forward = FeedForward(dim)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        kv: KeysValues | None = None,
        losses: dict[str, Tensor] | None = None,
    ) -> Tensor:
        borrowed: dict[str, Any] = {} if kv is None else {"kv": kv}
        if losses is None:
            mixed = self.attention(self.norm1(x), key_lengths=lengths, **borrowed)
            return self._rest(x + mixed, memory, memory_lengths)
        found = self.attention(self.norm1(x), key_lengths=lengths, need=("out", "losses"), **borrowed)
        for name, loss in found.losses.items():
            losses[name] = losses[name] + loss if name in losses else loss
        return self._rest(x + found.out, memory, memory_lengths)

    def keys_values(self, x: Tensor) -> KeysValues:
        """What this block's attention makes of x, for the blocks that borrow it."""
        return self.attention.keys_values(self.norm1(x))

    def step(
        self,
        x: Tensor,
        state: State,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        kv: KeysValues | None = None,
    ) -> tuple[Tensor, State]:
        borrowed: dict[str, Any] = {} if kv is None else {"kv": kv}
        mixed, state = self.attention.step(self.norm1(x), state, **borrowed)
        return self._rest(x + mixed, memory, memory_lengths), state

    def _rest(self, x: Tensor, memory: Tensor | None, memory_lengths: Tensor | None) -> Tensor:
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), memory, key_lengths=memory_lengths)
        return x + self.feed_forward(self.norm2(x))


class Stack(nn.ModuleList):
    """Blocks in order."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]


class Embedding(nn.Module):
    """Token vectors plus position vectors: `learned` up to max_length, `sinusoidal` at any length, or `none`."""

    def __init__(self, vocab: int, dim: int, max_length: int, positions: str = "learned") -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions: Any = position_vectors(positions, dim, max_length)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        x = self.tokens(tokens)
        return x if self.positions is None else self.positions(x, start)


class Transformer(nn.Module):
    """A decoder-only language model: tokens (B, L) to logits (B, L, vocab).

    The mechanism is made causal; one without a causal form is refused. Several mechanisms take turns: block n has the n-th,
    and they start again after the last. `positions` are vectors added to the tokens: learned (up to max_length), sinusoidal
    or none. `head_dim` is the size of queries and keys, dim / heads as that of values unless given. `init_state` and `step`
    decode token by token.

    With `share` above 1 only every `share`-th block, the first included, makes keys and values and keeps a state; the blocks
    after it read the same ones with their own queries (Brandon et al., Reducing Transformer Key-Value Cache Size with
    Cross-Layer Attention, 2024).

    >>> model = Transformer(vocab=16, dim=32, depth=1, heads=2, mechanism="window(4)", max_length=8)
    >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
    torch.Size([1, 8, 16])
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        mechanism: str | Mechanism | Sequence[str | Mechanism] = "causal",
        max_length: int = 512,
        positions: str = "learned",
        share: int = 1,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if share < 1:
            raise ValueError(
                f"share is the number of blocks that read one block's keys, at least 1, got {share}"
            )
        self.share = share
        given = [mechanism] if isinstance(mechanism, str | Mechanism) else mechanism
        if not given:
            raise ValueError(
                "a model needs at least one mechanism, got none; a single text serves all blocks"
            )
        self.mechanisms = tuple(causal(parse(m)) for m in given)
        turns = (self.mechanisms[n % len(self.mechanisms)] for n in range(depth))
        self.embedding = Embedding(vocab, dim, max_length, positions)
        self.blocks = Stack(
            Block(dim, heads, m, borrows=n % share > 0, head_dim=head_dim) for n, m in enumerate(turns)
        )
        self.norm = nn.LayerNorm(dim)

    def _logits(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.embedding.tokens.weight.T

    def forward(
        self, tokens: Tensor, lengths: Tensor | None = None, losses: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Logits of the next token at every position; later positions than `lengths` (B,) are padding.

        What the mechanism's parts ask training to add is added to `losses` by its name, summed over the blocks.
        """
        x = self.embedding(tokens)
        kv = None
        for block in self.blocks:
            kv = self._keys_values(block, x, kv)
            x = block(x, lengths, kv=kv, losses=losses)
        return self._logits(x)

    def _keys_values(self, block: Block, x: Tensor, kv: KeysValues | None) -> KeysValues | None:
        """The keys and values that a block reads: its owner's, or None where nothing is shared."""
        if self.share == 1 or block.borrows:
            return kv
        return block.keys_values(x)

    def init_state(self, batch: int) -> list[State]:
        """One state a block that makes keys and values, before the first token."""
        return [block.attention.init_state(batch) for block in self.blocks if not block.borrows]

    def step(self, tokens: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Logits of new tokens (B, n) after the tokens that the states have seen, and the states after them."""
        owners = sum(not block.borrows for block in self.blocks)
        if len(states) != owners:
            raise ValueError(
                f"{owners} blocks keep a state, got {len(states)} states; start from init_state(...)"
            )
        x = self.embedding(tokens, states[0].length)
        after: list[State] = []
        kv = None
        for n, block in enumerate(self.blocks):
            kv = self._keys_values(block, x, kv)
            x, state = block.step(x, states[n // self.share], kv=kv)
            if not block.borrows:
                after.append(state)
        return self._logits(x), after


class Encoder(nn.Module):
    """Tokens (B, L) to features (B, L, dim); every token may read every other unless the mechanism says otherwise."""

    def __init__(
        self,
        vocab: int,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        mechanism: str | Mechanism = "full",
        max_length: int = 512,
        positions: str = "learned",
    ) -> None:
        super().__init__()
        self.embedding = Embedding(vocab, dim, max_length, positions)
        self.blocks = Stack(Block(dim, heads, parse(mechanism)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features of every token; later positions than `lengths` (B,) are padding."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, lengths)
        return self.norm(x)


class EncoderDecoder(nn.Module):
    """Source tokens (B, S) and target tokens (B, L) to logits (B, L, vocab); the decoder reads the encoder's features."""

    def __init__(
        self,
        vocab: int,
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        mechanism: str | Mechanism = "full",
        cross: str | Mechanism = "full",
        max_length: int = 512,
        positions: str = "learned",
    ) -> None:
        super().__init__()
        own = parse(mechanism)
        self.encoder = Encoder(vocab, dim, depth, heads, own, max_length, positions)
        self.embedding = Embedding(vocab, dim, max_length, positions)
        self.blocks = Stack(Block(dim, heads, causal(own), parse(cross)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next target token at every position."""
        memory, x = self.encoder(source, source_lengths), self.embedding(target)
        for block in self.blocks:
            x = block(x, target_lengths, memory, source_lengths)
        return self.norm(x) @ self.embedding.tokens.weight.T

    def init_state(self, batch: int) -> list[State]:
        """One state a block, before the first target token."""
        return [block.attention.init_state(batch) for block in self.blocks]

    def step(
        self, target: Tensor, states: list[State], memory: Tensor, source_lengths: Tensor | None = None
    ) -> tuple[Tensor, list[State]]:
        """Logits of new target tokens (B, n) after those that the states have seen, and the states after them.

        `memory` (B, S, dim) is what the encoder makes of the source.
        """
        x, after = self.embedding(target, states[0].length), []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, state, memory, source_lengths)
            after.append(state)
        return self.norm(x) @ self.embedding.tokens.weight.T, after

    @torch.no_grad()
    def greedy(self, source: Tensor, start: int, length: int, source_lengths: Tensor | None = None) -> Tensor:
        """The likeliest next token, `length` times, after the token `start`: (B, length)."""
        memory = self.encoder(source, source_lengths)
        states = self.init_state(source.shape[0])
        token = torch.full((source.shape[0], 1), start, dtype=torch.long, device=source.device)
        found = []
        for _ in range(length):
            logits, states = self.step(token, states, memory, source_lengths)
            token = logits.argmax(-1)
            found.append(token)
        return torch.cat(found, dim=1)
