"""Attention in which every head stands for a label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.nn.attention import Attention
from saccade.plan import attend


class LabelAttention(nn.Module):
    """One learned query a label gathers the sentence into a vector; each token gets a few features a label from it.

    Label l: c_l = softmax(q_l K_l^T / sqrt(d)) V_l, then norm(x_i + c_l O_l) P_l. The features of the labels stand side by
    side and are never mixed, so each part of the answer belongs to one label. x (B, n, dim) to (B, n, labels label_dim).
    (Mrini et al., Rethinking Self-Attention: Towards Interpretability in Neural Parsing, 2020.)

    >>> import torch
    >>> LabelAttention(36, labels=6, label_dim=4)(torch.zeros(2, 9, 36)).shape
    torch.Size([2, 9, 24])
    """

    def __init__(
        self,
        dim: int,
        labels: int,
        label_dim: int,
        *,
        head_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if label_dim < 1:
            raise ValueError(f"label_dim must be at least 1, got {label_dim}")
        self.attention = Attention(dim, labels, "learned_queries", head_dim=head_dim, generator=generator)
        self.norm = nn.LayerNorm(dim)
        self.features = nn.Parameter(torch.randn(labels, dim, label_dim, generator=generator) / dim**0.5)

    def contexts(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """What every label gathered of a sentence, projected: (B, labels, dim), whatever token asks."""
        layer = self.attention
        heads = attend(*layer.project(x), layer.mechanism, key_lengths=key_lengths)[:, :, 0]
        own = layer.out_proj.weight.unflatten(1, (layer.sizes.heads, -1))
        return torch.einsum("bhe,dhe->bhd", heads, own)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """Features (B, n, labels label_dim) of tokens x (B, n, dim); later tokens than `key_lengths` (B,) are padding."""
        told = self.norm(x[:, :, None] + self.contexts(x, key_lengths)[:, None])
        return torch.einsum("bnhd,hde->bnhe", told, self.features).flatten(2)
