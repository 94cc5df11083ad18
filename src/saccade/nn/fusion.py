"""A language model of the targets helps an encoder-decoder to decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.nn.beam import beam_search
from saccade.nn.transformer import EncoderDecoder, Transformer
from saccade.parts.state import State

States = tuple[list[State], list[State], list[State]]


class ShallowFusion(nn.Module):
    """Scores log p(y | x) + weight log p_lm(y) - internal log p_own(y) of the next target token, for decoding.

    p_lm is a language model that saw targets alone. p_own is what the decoder itself says without a source, where
    cross-attention reads no key and answers zero: its internal language model, which the other one may replace. (Gulcehre
    et al., On Using Monolingual Corpora in Neural Machine Translation, 2015; Meng et al., Internal Language Model
    Estimation for Domain-Adaptive End-to-End Speech Recognition, 2021.)

    >>> model = EncoderDecoder(vocab=9, dim=16, depth=1, heads=2, cross="relaxed_attention(0.1)", max_length=8)
    >>> fused = ShallowFusion(model, Transformer(vocab=9, dim=16, depth=1, heads=2, max_length=8), weight=0.3)
    >>> fused.beam(torch.zeros(2, 5, dtype=torch.long), start=8, width=3, length=6)[0].shape
    torch.Size([2, 6])
    """

    def __init__(
        self, model: EncoderDecoder, language: Transformer, weight: float = 0.3, internal: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [m.embedding.tokens.num_embeddings for m in (model, language)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"both models must share their targets, got a model of {sizes[0]} tokens and a language model of {sizes[1]}"
            )
        if weight < 0 or internal < 0:
            raise ValueError(
                f"the weights of both language models are at least 0, got {weight} and {internal}; "
                "what the decoder knows by itself is subtracted already"
            )
        self.model, self.language, self.weight, self.internal = model, language, weight, internal

    def forward(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Fused scores (B, L, vocab) of the target token after every place of `target` (B, L)."""
        scores = self.model(source, target, source_lengths).log_softmax(-1)
        if self.weight:
            scores = scores + self.weight * self.language(target).log_softmax(-1)
        if self.internal:
            nothing = torch.zeros(len(source), dtype=torch.long, device=source.device)
            scores = scores - self.internal * self.model(source, target, nothing).log_softmax(-1)
        return scores

    def beam(
        self,
        source: Tensor,
        start: int,
        width: int,
        length: int,
        source_lengths: Tensor | None = None,
        end: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best target that a beam of `width` keeps after the token `start`, (B, length), and its fused score (B,).

        A target that has reached `end` is filled up with it. Raises ValueError for a width or a length below 1.
        """
        if width < 1 or length < 1:
            raise ValueError(
                f"a beam has a width and a length of at least 1, got width {width} and length {length}"
            )
        with torch.no_grad():
            memory = self.model.encoder(source, source_lengths).repeat_interleave(width, 0)
        lengths = None if source_lengths is None else source_lengths.repeat_interleave(width, 0)
        rows = len(memory)
        nothing = torch.zeros(rows, dtype=torch.long, device=source.device)

        def step(token: Tensor, states: States) -> tuple[Tensor, States]:
            own, other, blind = states
            y, own = self.model.step(token[:, None], own, memory, lengths)
            scores = y[:, 0].log_softmax(-1)
            if self.weight:
                y, other = self.language.step(token[:, None], other)
                scores = scores + self.weight * y[:, 0].log_softmax(-1)
            if self.internal:
                y, blind = self.model.step(token[:, None], blind, memory, nothing)
                scores = scores - self.internal * y[:, 0].log_softmax(-1)
            return scores, (own, other, blind)

        states = (self.model.init_state(rows), self.language.init_state(rows), self.model.init_state(rows))
        first = torch.full((len(source),), start, dtype=torch.long, device=source.device)
        return beam_search(step, _select, states, first, width, length, end)


def _select(states: States, rows: Tensor) -> States:
    own, other, blind = ([s.select(rows) for s in part] for part in states)
    return own, other, blind
