"""A sentence as the mean of its words' states, weighted by what a lexicon knows of the words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.plan import Attended, Weights, attend

MODES = ("plain", "concat", "gate", "affine")


class LexiconAttention(nn.Module):
    """r = sum_i a_i h_i, a = softmax(u.f(h_i, c_i)), with a learned u and features c of each word from a lexicon.

    f is tanh(W [h; c] + b) (`concat`), sigmoid(W c + b) h (`gate`), gamma(c) h + beta(c) with linear gamma and beta
    (`affine`), or h itself (`plain`). The lexicon decides how much a word counts; what it says comes from h alone. States
    (B, n, dim) and features (B, n, lexicon_dim) give (B, dim). (Margatina, Baziotis and Potamianos, Attention-based Conditioning
    Methods for External Knowledge Integration, 2019.)

    >>> LexiconAttention(8, 2)(torch.zeros(3, 5, 8), torch.zeros(3, 5, 2)).shape
    torch.Size([3, 8])
    """

    def __init__(self, dim: int, lexicon_dim: int, mode: str = "gate") -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self.query = nn.Parameter(torch.randn(dim) / dim**0.5)
        inputs = {"plain": 0, "concat": dim + lexicon_dim}.get(mode, lexicon_dim)
        self.condition = nn.Linear(inputs, 2 * dim if mode == "affine" else dim) if inputs else None

    def keys(self, states: Tensor, lexicon: Tensor) -> Tensor:
        """f of every word, (B, n, dim)."""
        if self.condition is None:
            return states
        if self.mode == "concat":
            return torch.tanh(self.condition(torch.cat((states, lexicon), -1)))
        told = self.condition(lexicon)
        if self.mode == "gate":
            return torch.sigmoid(told) * states
        gamma, beta = told.chunk(2, -1)
        return gamma * states + beta

    def forward(
        self,
        states: Tensor,
        lexicon: Tensor,
        key_lengths: Tensor | None = None,
        *,
        need: tuple[str | Weights, ...] = ("out",),
    ) -> Tensor | Attended:
        """The weighted mean (B, dim) of the words; with more in `need`, a named tuple whose `out` holds it.

        Later words than `key_lengths` (B,) are padding.
        """
        q = self.query.to(states.dtype).expand(states.shape[0], 1, 1, -1)
        k, v = self.keys(states, lexicon)[:, None], states[:, None]
        found = attend(q, k, v, "learned_queries + dot(1.0)", key_lengths=key_lengths, need=need)
        if isinstance(found, Attended):
            return found._replace(out=found.out[:, 0, 0])
        return found[:, 0, 0]
