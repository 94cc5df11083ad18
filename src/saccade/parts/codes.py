"""Keys that are read as the nearest vector of a codebook."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import MechanismError, NotSupported
from saccade.parts.base import Sizes, arg
from saccade.parts.score import Score, grouped_matmul

if TYPE_CHECKING:
    from saccade.parts.pair import Context, Tile

DEAD = 0.01  # the share of the mean mass below which a code starts anew


@dataclass(frozen=True)
class CodedDot(Score):
    """s = q.c / sqrt(d), c the one of `codes` vectors of the key's head that is nearest to the key.

    Keys of the query's own block of `block` tokens and of the block before take their gradient straight through the choice.
    Codes that stand for older keys are constants, so that counts and mean values a code can replace those keys. The loss
    `commit` is the mean squared distance of a key from its code. `refresh` moves each code towards the mean of its keys, a
    moving average that keeps `keep`; a code that hardly any key chose, at first each, starts anew at a key. (Lingle, Transformer-VQ:
    Linear-Time Transformers via Vector Quantization, 2024.)
    """

    codes: int = arg(64, at_least=1)
    block: int = arg(64, at_least=1)
    keep: float = arg(0.99, at_least=0.0)

    name = "coded_dot"
    gives = frozenset({"bilinear"})
    buffer_names = ("codes", "code_mass")
    straight_through = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep > 1:
            raise MechanismError(f"{self.name}: keep is a share of at most 1, got {self.keep:g}")

    def buffers(self, sizes: Sizes, generator: torch.Generator | None) -> dict[str, Tensor]:
        shape = (sizes.kv_heads, self.codes, sizes.head_dim)
        return {
            "codes": torch.randn(shape, generator=generator),
            "code_mass": torch.zeros(sizes.kv_heads, self.codes),
        }

    def codebook(self, c: Context) -> Tensor:
        """The codes (g, S, d) of a call, float32 or wider."""
        codes = c.buffers["codes"]
        wanted = (c.k.shape[1], self.codes, c.k.shape[-1])
        if codes.shape != wanted:
            raise NotSupported(
                f"{self} needs a buffer `codes` (key-value heads, codes, head_dim) = {wanted}, got {tuple(codes.shape)}"
            )
        return codes.detach().to(torch.promote_types(c.k.dtype, torch.float32))

    def coded(self, c: Context) -> tuple[Tensor, Tensor]:
        """Which code each key takes, (b, g, S), and that code with the key's gradient, (b, g, S, d)."""
        codes = self.codebook(c)
        k = c.k.to(codes.dtype)
        index = nearest(k.detach(), codes)
        return index, pick(codes, index) + (k - k.detach())

    def scaled(self, q: Tensor) -> Tensor:
        """Queries as codes are compared with them."""
        return q / math.sqrt(q.shape[-1])

    def prepare(self, c: Context) -> tuple[Tensor, Tensor]:
        k = self.coded(c)[1]
        return self.scaled(c.q.to(k.dtype)), k

    def tile(self, t: Tile) -> Tensor:
        s = grouped_matmul(t.q, t.k.mT)
        if not t.k.requires_grad:
            return s
        near = t.j // self.block >= t.i // self.block - 1
        return torch.where(near, s, grouped_matmul(t.q, t.k.detach().mT))

    def token_flops(self, head_dim: int) -> tuple[int, int]:
        return 0, 2 * self.codes * head_dim

    def losses(self, c: Context) -> dict[str, Tensor]:
        k = c.k if c.valid is None else c.k.masked_fill(~c.valid[:, None, :, None], 0)
        codes = self.codebook(c)
        k = k.to(codes.dtype)
        away = (k - pick(codes, nearest(k.detach(), codes))).square().sum(-1)
        return {"commit": away.mean() if c.valid is None else away.transpose(1, 2)[c.valid].mean()}

    @torch.no_grad()
    def refresh(
        self,
        buffers: dict[str, Tensor],
        q: Tensor,
        k: Tensor,
        valid: Tensor | None,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        codes, mass = (buffers[n].to(torch.promote_types(k.dtype, torch.float32)) for n in self.buffer_names)
        keys = k.to(codes.dtype).transpose(0, 1).flatten(1, 2)  # (g, b n, d)
        if valid is not None:
            keys = keys[:, valid.flatten()]
        if not keys.shape[1]:
            return {}
        index = nearest(keys[None], codes)[0]
        member = torch.nn.functional.one_hot(index, self.codes).to(codes.dtype)
        fresh = self.keep * mass + (1 - self.keep) * member.sum(1)
        total = self.keep * mass.unsqueeze(-1) * codes + (1 - self.keep) * member.mT @ keys
        moved = torch.where(fresh.unsqueeze(-1) > 0, total / fresh.unsqueeze(-1).clamp_min(1e-30), codes)
        mean = fresh.mean(-1, keepdim=True)
        dead = fresh < DEAD * mean
        chosen = torch.randint(keys.shape[1], index.shape[:1] + (self.codes,), generator=generator)
        other = keys.gather(1, chosen.to(keys.device).unsqueeze(-1).expand(-1, -1, keys.shape[-1]))
        return {
            "codes": torch.where(dead.unsqueeze(-1), other, moved).to(buffers["codes"].dtype),
            "code_mass": torch.where(dead, mean, fresh).to(buffers["code_mass"].dtype),
        }


def nearest(k: Tensor, codes: Tensor) -> Tensor:
    """The index of the code (g, S, d) nearest to each key (b, g, n, d): (b, g, n); the first of equals."""
    return (k @ codes.mT - codes.square().sum(-1)[:, None] / 2).argmax(-1)


def pick(codes: Tensor, index: Tensor) -> Tensor:
    """The codes (g, S, d) of an index (b, g, n): (b, g, n, d)."""
    heads = torch.arange(codes.shape[0], device=codes.device)[:, None]
    return codes[heads, index]


def usage(index: Tensor, codes: int) -> Tensor:
    """How many of the codes are in use, a head: the perplexity (g,) of the choices (b, g, n), from 1 to `codes`."""
    share = torch.nn.functional.one_hot(index, codes).double().mean((0, 2))
    return torch.exp(-torch.xlogy(share, share).sum(-1))
