"""Fine-grained recognition: attention from the most relevant patches, and over pairs of images in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.nn.attention import Attention
from saccade.nn.transformer import FeedForward
from saccade.plan import attend


def attention_rollout(weights: Sequence[Tensor]) -> Tensor:
    """The product of (A + I) / 2 over layers, the last one leftmost: (B, n, n) of weights (B, heads, n, n), A their mean over heads.

    Row i says how much each token of the input has reached token i. (Abnar and Zuidema, Quantifying Attention Flow in
    Transformers, 2020.)
    """
    if not weights:
        raise ValueError("rollout is the product over at least one layer, got none")
    eye = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    found = eye.expand(len(weights[0]), -1, -1)
    for w in weights:
        found = (w.mean(1) + eye) / 2 @ found
    return found


class PairBlock(nn.Module):
    """A pre-norm block of attention and feed-forward whose queries may be some rows, and whose keys may hold a second image."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.feed_forward = Attention(dim, heads, bias=True), FeedForward(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Self-attention: tokens (B, n, dim) to tokens and weights (B, heads, n, n)."""
        found = self.attention(self.norm1(x), need=("out", "weights"))
        return self._rest(x + found.out), found.weights

    def local(self, x: Tensor, rows: Tensor) -> Tensor:
        """Global-local cross-attention: the tokens `rows` (B, r) read all tokens; (B, r, dim)."""
        index, normed = rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]), self.norm1(x)
        return self._rest(x.gather(1, index) + self.attention(normed.gather(1, index), normed))

    def pair(self, x: Tensor, other: Tensor, present: Tensor | None = None) -> Tensor:
        """Pair-wise cross-attention: queries of x over the keys of x and of `other`, where that is `present` (B,)."""
        q, k, v = self.attention.project(self.norm1(x))
        k2, v2 = self.attention.keys_values(self.norm1(other))
        mask = None
        if present is not None:
            own = present.new_ones(len(x), x.shape[1])
            mask = torch.cat((own, present[:, None].expand(-1, other.shape[1])), 1)[:, None, None]
        out = attend(q, torch.cat((k, k2), 2), torch.cat((v, v2), 2), "full", mask=mask)
        return self._rest(x + self.attention.out_proj(out.transpose(1, 2).flatten(2)))

    def _rest(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(self.norm2(x))


class DCAL(nn.Module):
    """Images (B, channels, size, size) to logits (B, classes) twice: of self-attention and of global-local cross-attention.

    After `depth` blocks, rollout tells which share of the patches reached the class token most; a block of its own lets the
    class token and these patches read all tokens. In training, `loss` adds a third branch with the weights of the blocks,
    whose keys are those of the image and of a second one. (Zhu et al., Dual Cross-Attention Learning for Fine-Grained Visual
    Categorization and Object Re-Identification, 2022.)

    >>> model = DCAL(classes=3, size=16, patch=4, dim=16, depth=1, heads=2)
    >>> [x.shape for x in model(torch.zeros(2, 3, 16, 16))]
    [torch.Size([2, 3]), torch.Size([2, 3])]
    """

    def __init__(
        self,
        classes: int,
        *,
        size: int = 32,
        patch: int = 4,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        share: float = 0.1,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"an image of {size} x {size} is not made of patches of {patch} x {patch}")
        if not 0 < share <= 1:
            raise ValueError(
                f"share is that of the patches that are chosen, above 0 and at most 1, got {share}"
            )
        patches = (size // patch) ** 2
        self.top = max(1, round(share * patches))
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.first, self.places = (
            nn.Parameter(torch.zeros(1, 1, dim)),
            nn.Parameter(torch.zeros(1, patches + 1, dim)),
        )
        nn.init.normal_(self.places, std=0.02)
        self.blocks = nn.ModuleList(PairBlock(dim, heads) for _ in range(depth))
        self.local = PairBlock(dim, heads)
        self.norms, self.heads = (
            nn.ModuleList(nn.LayerNorm(dim) for _ in range(2)),
            nn.ModuleList(nn.Linear(dim, classes) for _ in range(2)),
        )
        self.doubt = nn.Parameter(torch.zeros(3))

    def embed(self, images: Tensor) -> Tensor:
        """The class token and the patches, (B, patches + 1, dim)."""
        x = self.patches(images).flatten(2).mT
        return torch.cat((self.first.expand(len(x), -1, -1), x), 1) + self.places

    def relevant(self, weights: Sequence[Tensor]) -> Tensor:
        """The class token and the patches that reached it most, (B, top + 1)."""
        reached = attention_rollout([w.detach() for w in weights])[:, 0, 1:]
        rows = reached.topk(self.top, -1).indices + 1
        return torch.cat((torch.zeros_like(rows[:, :1]), rows), 1)

    def _branches(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits of both branches, and the tokens before each block."""
        x, weights, before = self.embed(images), [], []
        for block in self.blocks:
            before.append(x)
            x, w = block(x)
            weights.append(w)
        local = self.local.local(x, self.relevant(weights))
        return self._logits(x, 0), self._logits(local, 1), before

    def _logits(self, x: Tensor, head: int) -> Tensor:
        found: Tensor = self.heads[head](self.norms[head](x[:, 0]))
        return found

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of self-attention and of global-local cross-attention; a prediction is their mean in probability."""
        return self._branches(images)[:2]

    def predict(self, images: Tensor) -> Tensor:
        """Probabilities of the classes, (B, classes): the mean of both branches."""
        a, b = self(images)
        return (a.softmax(-1) + b.softmax(-1)) / 2

    def loss(self, images: Tensor, labels: Tensor, other: Tensor | None = None) -> Tensor:
        """Cross-entropies, weighted as sum (exp(-w) L + w) / 2 by learned w; each image is paired with that of the index `other` (B,).

        Without `other` there is no third branch.
        """
        a, b, before = self._branches(images)
        terms = [F.cross_entropy(x, labels) for x in (a, b)]
        if other is not None:
            x = before[0]
            for block, tokens in zip(self.blocks, before, strict=True):
                assert isinstance(block, PairBlock)
                x = block.pair(x, tokens[other])
            terms.append(F.cross_entropy(self._logits(x, 0), labels))
        losses = torch.stack(terms)
        doubt = self.doubt[: len(terms)]
        return ((-doubt).exp() * losses + doubt).sum() / 2
