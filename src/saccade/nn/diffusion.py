"""A language model that fills masked tokens in any order, a few a step, and may keep its choice of pairs from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.mechanism import Mechanism, Pairwise
from saccade.mechanism import mechanism as parse
from saccade.nn.transformer import Encoder
from saccade.parts.selection import Blocks
from saccade.plan import attend


@dataclass
class Choices:
    """What every layer chose, to be replayed, and how often a whole model chose."""

    layers: list[Blocks] = field(default_factory=list)
    built: int = 0


@dataclass(frozen=True)
class Generated:
    """Filled tokens (B, L), and the choices that the sparse steps shared; None where all steps were dense."""

    tokens: Tensor
    choices: Choices | None


class MaskedDiffusion(nn.Module):
    """A bidirectional Transformer over tokens of which some are masked: (B, L) to logits (B, L, vocab).

    The token `vocab` is the mask. `loss` trains it, `generate` fills masks step by step (Nie et al., Large Language Diffusion
    Models, 2025), after some dense steps by a sparse mechanism whose choice of blocks is made once (Wang et al., SparseD, 2025).

    >>> model = MaskedDiffusion(vocab=4, dim=16, depth=1, heads=2, max_length=8)
    >>> model.generate(torch.full((1, 8), model.mask), steps=4).tokens.shape
    torch.Size([1, 8])
    """

    def __init__(
        self, vocab: int, dim: int = 64, depth: int = 2, heads: int = 4, max_length: int = 128
    ) -> None:
        super().__init__()
        self.vocab = self.mask = vocab
        self.encoder = Encoder(vocab + 1, dim, depth, heads, "full", max_length)
        self.readout = nn.Linear(dim, vocab)

    def forward(
        self, tokens: Tensor, mechanism: str | Mechanism = "full", choices: Choices | None = None
    ) -> Tensor:
        """Logits of every token, by a mechanism that learns nothing; `choices` are replayed, and filled where empty."""
        m, x = parse(mechanism), self.encoder.embedding(tokens)
        replayed = list(choices.layers) if choices is not None else []
        if choices is not None and not replayed:
            choices.built += 1
        for n, block in enumerate(self.encoder.blocks):
            q, k, v = block.attention.project(block.norm1(x))
            if choices is None:
                out = attend(q, k, v, m)
            elif replayed:
                out = attend(q, k, v, m, selection=replayed[n])
            else:
                found = attend(q, k, v, m, need=("out", "selection"))
                assert isinstance(found.selection, Blocks)
                choices.layers.append(found.selection)
                out = found.out
            x = x + block.attention.out_proj(out.transpose(1, 2).flatten(2))
            x = x + block.feed_forward(block.norm2(x))
        return self.readout(self.encoder.norm(x))

    def loss(
        self,
        tokens: Tensor,
        generator: torch.Generator,
        prompt: int = 0,
        mechanism: str | Mechanism = "full",
    ) -> Tensor:
        """Cross-entropy of masked tokens over the share t that was masked, a bound of the likelihood of what follows `prompt`.

        t is uniform, spread evenly over the rows.
        """
        rows, length = tokens.shape
        start = torch.rand(1, generator=generator)
        share = ((start + torch.arange(rows) / rows) % 1).clamp_min(1 / length).unsqueeze(1)
        gone = torch.rand(rows, length, generator=generator) < share
        gone[:, :prompt] = False
        gone, share = gone.to(tokens.device), share.to(tokens.device)
        logits = self(tokens.masked_fill(gone, self.mask), mechanism)
        each = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        return (each * gone / share).sum() / (rows * (length - prompt))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        steps: int,
        *,
        sparse: str | Mechanism | None = None,
        skip: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> Generated:
        """Fill the masks of tokens (B, L), each step as many of the surest as leave the rest to the later steps.

        Tokens are drawn with the generator, or the likeliest without one. With `sparse`, a mechanism that chooses blocks, the steps
        from skip * steps on use it: the first of them chooses, the others replay.
        """
        if steps < 1 or not 0 <= skip <= 1:
            raise ValueError(f"steps must be at least 1 and skip in 0..1, got steps={steps} and skip={skip}")
        m = None if sparse is None else parse(sparse)
        if m is not None and (not isinstance(m, Pairwise) or m.static):
            raise ValueError(
                f"sparse must choose pairs by content, as sparsed(...) does, got {m}; a fixed pattern goes into forward(...)"
            )
        tokens, choices = tokens.clone(), None
        for step in range(steps):
            if m is not None and step >= skip * steps:
                choices = choices or Choices()
                logits = self(tokens, m, choices)
            else:
                logits = self(tokens)
            tokens = fill(tokens, logits, self.mask, steps - step, generator)
        return Generated(tokens, choices)


def fill(tokens: Tensor, logits: Tensor, mask: int, left: int, generator: torch.Generator | None) -> Tensor:
    """Tokens (B, L) with the surest 1 / `left` of the masks of every row filled, rounded up, from logits (B, L, vocab)."""
    odds = torch.softmax(logits.float(), -1)
    if generator is None:
        drawn = odds.argmax(-1)
    else:
        noise = torch.rand(odds.shape, generator=generator).to(odds.device)
        drawn = (odds.log() - (-noise.log()).log()).argmax(-1)
    sure = odds.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    open_ = tokens == mask
    sure = sure.masked_fill(~open_, -1)
    count = torch.ceil(open_.sum(-1, keepdim=True) / left)
    rank = sure.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return torch.where(open_ & (rank < count), drawn, tokens)


def overlap(a: Blocks, b: Blocks) -> float:
    """The share of the blocks chosen in `a` that `b` chose too; chance is the share that `b` keeps."""
    units = 1 + max(int(x.index.max()) for x in (a, b))
    tables = [
        torch.zeros((*x.index.shape[:3], units), dtype=torch.uint8)
        .scatter_reduce_(-1, x.index.cpu(), x.valid.cpu().byte(), "amax")
        .bool()
        for x in (a, b)
    ]
    return float((tables[0] & tables[1]).sum() / tables[0].sum())
