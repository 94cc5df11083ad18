"""An LSTM that writes captions, with attention to regions and a visual sentinel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.mechanism import mechanism as parse
from saccade.parts.base import Sizes
from saccade.plan import attend


class SentinelCaptioner(nn.Module):
    """Regions (B, K, width) and caption tokens (B, L) to logits (B, L, vocab) and the sentinel's weight (B, L).

    With h and m the LSTM's output and cell, the sentinel is sigmoid(Wx x + Wh h_before) tanh(m), and the logits are
    those of context + h. The LSTM reads the words alone, so that the image is seen through attention only. Without a sentinel the context is that of the regions alone and the weight is 0. (Lu et al.,
    Knowing When to Look, 2017.)

    >>> model = SentinelCaptioner(width=5, vocab=7, dim=8)
    >>> logits, beta = model(torch.zeros(2, 9, 5), torch.zeros(2, 4, dtype=torch.long))
    >>> logits.shape, beta.shape
    (torch.Size([2, 4, 7]), torch.Size([2, 4]))
    """

    def __init__(self, width: int, vocab: int, dim: int = 64, sentinel: bool = True) -> None:
        super().__init__()
        self.mechanism = parse("adaptive_attention" if sentinel else "additive")
        self.regions = nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.embedding = nn.Embedding(vocab, dim)
        self.cell = nn.LSTMCell(dim, dim)
        self.gate_x, self.gate_h = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.readout = nn.Linear(dim, vocab)
        declared = self.mechanism.weights(Sizes(1, 1, dim, dim))
        self.weights = nn.ParameterDict({n: nn.Parameter(w.make()) for n, w in declared.items()})

    def forward(self, regions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the token after each one, and how much each looked at the sentinel."""
        seen = self.regions(regions)
        h = m = torch.zeros_like(seen[:, 0])
        states, sentinels = [], []
        for x in self.embedding(tokens).unbind(1):
            gate = torch.sigmoid(self.gate_x(x) + self.gate_h(h))
            h, m = self.cell(x, (h, m))
            states.append(h)
            sentinels.append(gate * torch.tanh(m))
        hidden, keys = torch.stack(states, 1), seen[:, None]
        streams = {"sentinel": torch.stack(sentinels, 1)[:, None]} if self.mechanism.streams(_ONE) else {}
        found = attend(
            hidden[:, None],
            keys,
            keys,
            self.mechanism,
            params=dict(self.weights.items()),
            streams=streams,
            need=("out", "weights"),
        )
        assert found.weights is not None
        beta = 1 - found.weights[:, 0].sum(-1)
        return self.readout(found.out[:, 0] + hidden), beta


_ONE = Sizes(1, 1, 1, 1)
