"""Masks that fall apart into independent sequences: residue classes of a dilation or stride, blocks of a chunk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from saccade.cost import Request
from saccade.parts.algebra import And, Full, Pairs
from saccade.parts.mask import Causal, Chunk, Dilated, Neighborhood, Strided, Window


@dataclass(frozen=True)
class Fold:
    """`count` sequences that never meet, each under `pairs`: classes modulo `count`, or `count` blocks in a row."""

    count: int
    pairs: Pairs
    blocks: bool

    def into(self, x: Tensor, groups: int) -> Tensor:
        """(b, h, n, d) to (b, h count, m, d), so that query heads still follow their key-value head; padded at the end."""
        b, h, n, d = x.shape
        x = pad(x, (0, 0, 0, -n % self.count)) if not self.blocks else x
        if self.blocks:
            x = x.view(b, groups, h // groups, self.count, -1, d).transpose(2, 3)
        else:
            x = x.view(b, groups, h // groups, -1, self.count, d).permute(0, 1, 4, 2, 3, 5)
        return x.reshape(b, h * self.count, -1, d)

    def back(self, x: Tensor, heads: int, groups: int, n: int) -> Tensor:
        """The inverse of `into`, for (b, h count, m, d)."""
        b, _, m, d = x.shape
        x = x.view(b, groups, self.count, heads // groups, m, d)
        x = x.transpose(2, 3) if self.blocks else x.permute(0, 1, 3, 4, 2, 5)
        return x.reshape(b, heads, -1, d)[:, :, :n]


def fold_of(pairs: Pairs, r: Request) -> Fold | None:
    """How a mask falls apart, where the call is whole self-attention; None where it does not."""
    if r.shifted or r.ragged or r.masked or r.decoding:
        return None
    atoms = [p for p in (pairs.parts if isinstance(pairs, And) else (pairs,)) if not isinstance(p, Causal)]
    if len(atoms) != 1:
        return None
    atom, n = atoms[0], r.shape.length
    if isinstance(atom, Dilated) and atom.step > 1:
        return Fold(atom.step, Window(atom.width), blocks=False)
    if isinstance(atom, Strided) and atom.step > 1:
        return Fold(atom.step, Causal(), blocks=False)
    if isinstance(atom, Neighborhood) and atom.dilation > 1 and atom is pairs and n % atom.dilation == 0:
        return Fold(atom.dilation, Neighborhood(atom.width), blocks=False)
    if isinstance(atom, Chunk) and n % atom.size == 0:
        return Fold(n // atom.size, Full() if atom is pairs else Causal(), blocks=True)
    return None
