"""An LSTM that reads, an LSTM that writes, and Luong attention with input feeding between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.errors import NotSupported
from saccade.mechanism import Mechanism, Pairwise
from saccade.mechanism import mechanism as parse
from saccade.nn.attention import StreamNet
from saccade.parts.algebra import Full
from saccade.parts.base import Sizes
from saccade.parts.select import CentredSpan
from saccade.plan import attend


class LuongSeq2Seq(nn.Module):
    """Source tokens (B, S) and target tokens (B, L) to logits (B, L, vocab).

    At every step the decoder's state h attends to the encoder's states, and h~ = tanh(Wc [context; h]) gives the
    logits and is fed, beside the next token, to the next step. Without a mechanism h~ sees h alone: the plain
    encoder-decoder. Raises NotSupported for a mechanism that places pairs by the query's own position, which a
    decoder step does not have in the source. (Luong et al., Effective Approaches to Attention-based Neural Machine
    Translation, 2015.)

    >>> model = LuongSeq2Seq(vocab=7, dim=8)
    >>> model(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)).shape
    torch.Size([2, 3, 7])
    """

    def __init__(
        self, vocab: int, dim: int = 128, mechanism: str | Mechanism | None = "luong_attention"
    ) -> None:
        super().__init__()
        self.mechanism = None if mechanism is None else parse(mechanism)
        self.embedding = nn.Embedding(vocab, dim)
        self.encoder = nn.LSTM(dim, dim, batch_first=True)
        self.cell = nn.LSTMCell(2 * dim, dim)
        self.combine = nn.Linear(dim if mechanism is None else 2 * dim, dim, bias=False)
        self.readout = nn.Linear(dim, vocab)
        self.weights, self.streams = nn.ParameterDict(), nn.ModuleDict()
        if self.mechanism is not None:
            _check(self.mechanism)
            sizes = Sizes(1, 1, dim, dim)
            for name, weight in self.mechanism.weights(sizes).items():
                self.weights[name] = nn.Parameter(weight.make())
            for name, stream in self.mechanism.streams(sizes).items():
                self.streams[name] = StreamNet(dim, 1, stream)

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of the token after each target token; source tokens later than `lengths` (B,) are padding."""
        return self._decode(source, lengths, target[:, 0], target.shape[1], target)

    @torch.no_grad()
    def greedy(self, source: Tensor, start: int, length: int, lengths: Tensor | None = None) -> Tensor:
        """The likeliest next token, `length` times, after the token `start`: (B, length)."""
        first = torch.full_like(source[:, 0], start)
        return self._decode(source, lengths, first, length).argmax(-1)

    def _decode(
        self, source: Tensor, lengths: Tensor | None, token: Tensor, steps: int, target: Tensor | None = None
    ) -> Tensor:
        memory, (h, c) = self._encode(source, lengths)
        fed = torch.zeros_like(h)
        logits = []
        for step in range(steps):
            if target is not None:
                token = target[:, step]
            h, c = self.cell(torch.cat((self.embedding(token), fed), dim=-1), (h, c))
            fed = torch.tanh(self.combine(self._with_context(h, memory, lengths)))
            logits.append(self.readout(fed))
            token = logits[-1].argmax(-1)
        return torch.stack(logits, dim=1)

    def _encode(self, source: Tensor, lengths: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The encoder's states (B, S, dim) and what it holds after the last token that is no padding."""
        x = self.embedding(source)
        if lengths is None:
            memory, (h, c) = self.encoder(x)
            return memory, (h[0], c[0])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, (h, c) = self.encoder(packed)
        memory, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        return memory, (h[0], c[0])

    def _with_context(self, h: Tensor, memory: Tensor, lengths: Tensor | None) -> Tensor:
        if self.mechanism is None:
            return h
        q, keys = h[:, None], memory.shape[1] if lengths is None else lengths
        context = attend(
            q[:, None],
            memory[:, None],
            memory[:, None],
            self.mechanism,
            key_lengths=lengths,
            params=dict(self.weights.items()),
            streams={name: net(q, keys) for name, net in self.streams.items()},
        )
        assert isinstance(context, Tensor)
        return torch.cat((context[:, 0, 0], h), dim=-1)


def _check(m: Mechanism) -> None:
    if not isinstance(m, Pairwise) or not all(isinstance(p, Full | CentredSpan) for p in m.pairs.leaves()):
        raise NotSupported(
            f"{m} places pairs by the query's own position, which a decoder step does not have in the source; use "
            "luong_attention or luong_attention(local=predictive)"
        )
