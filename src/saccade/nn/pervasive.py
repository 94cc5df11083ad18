"""Source and target as the two axes of a grid: causal two-dimensional convolutions in the place of encoder and decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import NotSupported

POOLINGS = ("max", "attention")


@dataclass(frozen=True)
class GridState:
    """What decoding keeps: source vectors (B, d, S), which are real (B, S), and the last rows that each layer looks back to."""

    source: Tensor
    real: Tensor
    rows: tuple[Tensor, ...]


class CellNorm(nn.BatchNorm2d):
    """Batch normalisation of x (B, C, T, S) over the cells that are real, (B, T, S); the others become zero."""

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        assert real is not None
        if not self.training:
            return super().forward(x).masked_fill(~real[:, None], 0)
        found = super().forward(x.movedim(1, -1)[real].T[None, :, :, None])
        out = x.new_zeros(*real.shape, x.shape[1], dtype=found.dtype)
        out[real] = found[0, :, :, 0].T
        return out.movedim(-1, 1)


class GridLayer(nn.Module):
    """`growth` new channels of a cell from those of the cells around it, in its row and in `width` // 2 rows above."""

    def __init__(self, channels: int, growth: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = CellNorm(channels), CellNorm(4 * growth)
        self.squeeze = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.conv = nn.Conv2d(
            4 * growth, growth, (width // 2 + 1, width), padding=(0, width // 2), bias=False
        )

    def forward(self, x: Tensor, real: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, T, S), its real cells (B, T, S) and the rows above it, to new channels and the rows for a later call."""
        h = F.relu(self.norm2(self.squeeze(F.relu(self.norm1(x, real))), real))
        rows = torch.cat((above, h), 2)
        return self.conv(rows), rows[:, :, rows.shape[2] - above.shape[2] :]


class PervasiveAttention(nn.Module):
    """Source tokens (B, S) and target tokens (B, T), begun by a start token, to logits of the next target token (B, T, vocab).

    Cell (i, j) starts as the vectors of target token i and source token j. Each of `depth` densely connected layers adds
    `growth` channels by a width x width convolution whose rows below its own are left out. A row is then pooled over the
    source, by the greatest value a channel or by attention. Batch norms take their statistics over real cells. (Elbayad
    et al., Pervasive Attention: 2D Convolutional Neural Networks for Sequence-to-Sequence Prediction, 2018.)

    >>> model = PervasiveAttention(vocab=11, dim=8, depth=2, growth=4)
    >>> model(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 7, dtype=torch.long)).shape
    torch.Size([1, 7, 11])
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 32,
        depth: int = 4,
        growth: int = 16,
        width: int = 3,
        pooling: str = "max",
    ) -> None:
        super().__init__()
        if min(vocab, dim, depth, growth) < 1 or width < 1 or width % 2 == 0:
            raise ValueError(
                "vocab, dim, depth and growth must be at least 1 and width an odd number, got "
                f"vocab={vocab}, dim={dim}, depth={depth}, growth={growth}, width={width}"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.above = width // 2
        self.source, self.target = nn.Embedding(vocab, dim), nn.Embedding(vocab, dim)
        sizes = [2 * dim + growth * n for n in range(depth + 1)]
        self.layers = nn.ModuleList(GridLayer(n, growth, width) for n in sizes[:-1])
        self.norm, self.out_proj = CellNorm(sizes[-1]), nn.Linear(sizes[-1], vocab)
        self.score = nn.Conv2d(sizes[-1], 1, 1) if pooling == "attention" else None

    def begin(self, source: Tensor, source_lengths: Tensor | None = None) -> GridState:
        """The state before the first target token."""
        if source_lengths is not None and int(source_lengths.min()) < 1:
            raise ValueError(
                f"a row is pooled over at least one source token, got source_lengths {source_lengths.tolist()}"
            )
        x, (batch, size) = self.source(source).mT, source.shape
        real = torch.ones(batch, size, dtype=torch.bool, device=x.device)
        if source_lengths is not None:
            real = torch.arange(size, device=x.device) < source_lengths[:, None]
        empty = (x.new_zeros(batch, n.conv.in_channels, self.above, size) for n in self.layers)  # type: ignore[union-attr]
        return GridState(x, real, tuple(empty))

    def _features(
        self, target: Tensor, state: GridState, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, GridState]:
        """Channels (B, C, T, S) of new target tokens against the source, the real cells and the state after."""
        if target.shape[0] != state.source.shape[0]:
            raise ValueError(f"{state.source.shape[0]} sources need as many targets, got {target.shape[0]}")
        y = self.target(target).mT
        real = state.real[:, None].expand(-1, y.shape[2], -1)
        if lengths is not None:
            real = real & (torch.arange(y.shape[2], device=y.device) < lengths[:, None])[:, :, None]
        cells = y.shape[2], state.source.shape[2]
        x = torch.cat(
            (y[..., None].expand(-1, -1, *cells), state.source[:, :, None].expand(-1, -1, *cells)), 1
        )
        rows = []
        for layer, above in zip(self.layers, state.rows, strict=True):
            new, last = layer(x, real, above)
            x = torch.cat((x, new), 1)
            rows.append(last)
        return F.relu(self.norm(x, real)), real, GridState(state.source, state.real, tuple(rows))

    def _pool(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Row features (B, T, C), and how much of each row came from each source token (B, T, S)."""
        if self.score is not None:
            s = self.score(x)[:, 0].masked_fill(~real, torch.finfo(x.dtype).min)
            w = torch.softmax(s, -1)
            return torch.einsum("bts,bcts->btc", w, x), w
        top, at = x.masked_fill(~real[:, None], -1.0).max(-1)
        found = F.one_hot(at, x.shape[-1]) * (top > 0).unsqueeze(-1)
        share = found.sum(1).to(x.dtype)
        return top.clamp_min(0).mT, share / share.sum(-1, keepdim=True).clamp_min(1)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next target token at every position; later tokens than the lengths (B,) are padding."""
        x, real, _ = self._features(target, self.begin(source, source_lengths), target_lengths)
        return self.out_proj(self._pool(x, real)[0])

    def align(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """(B, T, S): the share of active channels whose greatest value stands at a source token, or the pooling's weights."""
        x, real, _ = self._features(target, self.begin(source, source_lengths))
        return self._pool(x, real)[1]

    def step(self, target: Tensor, state: GridState) -> tuple[Tensor, GridState]:
        """Logits of new target tokens (B, n), usually one, after those that the state has seen, and the state after them."""
        if self.training:
            raise NotSupported(
                "in training the batch norms see all rows at once, and a step sees its own: call eval() before decoding"
            )
        x, real, after = self._features(target, state)
        return self.out_proj(self._pool(x, real)[0]), after

    @torch.no_grad()
    def greedy(self, source: Tensor, start: int, length: int, source_lengths: Tensor | None = None) -> Tensor:
        """The likeliest next token, `length` times, after the token `start`: (B, length)."""
        state = self.begin(source, source_lengths)
        token = torch.full((source.shape[0], 1), start, dtype=torch.long, device=source.device)
        found = []
        for _ in range(length):
            logits, state = self.step(token, state)
            token = logits.argmax(-1)
            found.append(token)
        return torch.cat(found, dim=1)
