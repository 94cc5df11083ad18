"""How far information travels: which tokens a token can have heard of after so many layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.errors import NotSupported
from saccade.mechanism import ByHead, Combine, Mechanism, Pairwise, Recurrent
from saccade.mechanism import mechanism as parse
from saccade.parts.algebra import Pairs, is_static, static_exist

LARGEST, ROWS = 4096, 256


@dataclass(frozen=True)
class ReceptiveField:
    """`coverage[n - 1]` is the share of all pairs, the past ones where causal, that n layers connect.

    `hops` is the number of layers that connect all of them, None where they never do. `reach[n - 1]` is the distance up
    to which n layers connect every pair without a gap. A layer passes on what its heads read and, past attention, the
    token itself.
    """

    length: int
    coverage: tuple[float, ...]
    reach: tuple[int, ...]

    @property
    def hops(self) -> int | None:
        """Layers until everything is covered."""
        return len(self.coverage) if self.coverage[-1] == 1.0 else None


def receptive_field(
    mechanism: str | Mechanism | Sequence[str | Mechanism],
    length: int,
    *,
    heads: int = 1,
    layers: int | None = None,
    block: int = 1,
) -> ReceptiveField:
    """The receptive field of stacked layers of a mechanism over `length` tokens, by boolean matrix products.

    Layers are added until all is covered, nothing more is gained, or `layers` is reached; where they differ, give the
    mechanism of each, the first layer first. `heads` matters to masks that
    differ between heads, whose union a layer reads. With `block` the tokens are grouped, and a group reads another as soon
    as one of its tokens reads one: an upper bound at a lower price. Raises NotSupported for choices by content.

    >>> receptive_field("window(9)", 64).hops
    8
    >>> receptive_field("powerattention(1)", 64).reach[:4]
    (2, 6, 14, 30)
    """
    alike = isinstance(mechanism, str | Mechanism)
    given = [parse(m) for m in ((mechanism,) if isinstance(mechanism, str | Mechanism) else mechanism)]
    count = -(-length // block)
    if not given or not 1 <= count <= LARGEST or block < 1:
        raise ValueError(
            f"receptive_field follows 1 to {LARGEST:,} tokens or blocks of tokens through at least one layer, got {length} "
            f"tokens in blocks of {block} and {len(given)} layers"
        )
    i, j = torch.arange(count)[:, None], torch.arange(count)[None]
    causal = all(m.causal for m in given)
    wanted = j <= i if causal else torch.ones(count, count, dtype=torch.bool)
    found, coverage, reach = torch.eye(count, dtype=torch.bool), [], []
    step, last = found.float(), layers or (LARGEST if alike else len(given))
    for n in range(last):
        if n < len(given):
            step = _step(given[n], length, heads, block).float()
        new = step @ found.float() > 0
        if alike and n and torch.equal(new, found):
            break
        found = new
        coverage.append(_share(found, wanted))
        reach.append(_gapless(found, wanted))
        if coverage[-1] == 1.0:
            break
    return ReceptiveField(length, tuple(coverage), tuple(reach))


def _step(m: Mechanism, length: int, heads: int, block: int) -> Tensor:
    """What one layer connects, the token itself included."""
    found = torch.eye(-(-length // block), dtype=torch.bool)
    for pairs in _layers(m, heads):
        found |= _reads(pairs, length, block)
    return found


def _layers(m: Mechanism, heads: int) -> Iterator[Pairs]:
    """The pair expressions of all heads of a layer."""
    if isinstance(m, Combine):
        share = m.share(heads) if isinstance(m, ByHead) else heads
        for child in m.children:
            yield from _layers(child, share)
    elif isinstance(m, Pairwise) and (m.summary is not None or not is_static(m.pairs)):
        raise NotSupported(
            f"{m} chooses what it reads by content; a receptive field is that of masks by position"
        )
    elif isinstance(m, Pairwise | Recurrent):
        yield from dict.fromkeys(m.pairs.at(h, heads) for h in range(heads))
    else:
        raise NotSupported(f"{m} has no single pairs: it reads everything at once")


def _reads(pairs: Pairs, length: int, block: int) -> Tensor:
    """Which groups of tokens read which."""
    j, short, found = torch.arange(length)[None], -length % block, []
    slab = -(-ROWS // block) * block
    for a in range(0, length, slab):
        row = static_exist(pairs, torch.arange(a, min(length, a + slab))[:, None], j)
        row = pad(row, (0, short, 0, -row.shape[0] % block))
        found.append(row.view(-1, block, row.shape[1] // block, block).any(3).any(1))
    return torch.cat(found)


def _share(found: Tensor, wanted: Tensor) -> float:
    return int((found & wanted).sum()) / int(wanted.sum())


def _gapless(found: Tensor, wanted: Tensor) -> int:
    missing = wanted & ~found
    gap = (torch.arange(len(found))[:, None] - torch.arange(len(found))).abs()
    return int(gap[missing].min()) - 1 if bool(missing.any()) else len(found) - 1
