"""Contextual counts against a loop over all keys between a query and a key."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from parts import tools
from saccade.parts.algebra import Mask
from saccade.parts.count import ContextCount
from saccade.parts.mask import Causal, Sink, Window

B, H, G, L, S, D = 2, 4, 2, 6, 9, 5


def by_loops(q: Tensor, k: Tensor, e: Tensor, most: int) -> Tensor:
    """q.k / sqrt(d) + the interpolated q.e / sqrt(d) at the clamped sum of sigmoid(q.k) over the keys j..i; nan for j > i."""
    out = torch.full((B, H, L, S), math.nan, dtype=torch.float64)
    for b, h, row, j in itertools.product(range(B), range(H), range(L), range(S)):
        x, i, g = q[b, h, row], row + S - L, h * G // H
        if j > i:
            continue
        p = min(most, sum(1 / (1 + math.exp(-float(x @ k[b, g, t]))) for t in range(j, i + 1)))
        low, high = math.floor(p), math.ceil(p)
        z = (p - low) * float(x @ e[high]) + (1 - p + low) * float(x @ e[low])
        out[b, h, row, j] = (float(x @ k[b, g, j]) + z) / math.sqrt(D)
    return out


@pytest.mark.parametrize("most", [1, 3, 20])
@pytest.mark.parametrize("pairs", [Causal(), Causal() & (Window(3) | Sink(2))])
def test_by_loops(most: int, pairs: Mask) -> None:
    q, k = torch.randn(B, H, L, D, dtype=torch.float64), torch.randn(B, G, S, D, dtype=torch.float64)
    e = torch.randn(most + 1, D, dtype=torch.float64)
    m = sc.Pairwise(pairs=pairs, logits=(ContextCount(most),))
    got = tools.logits(m, q, k, params={"context_count": e})
    exist = pairs.exist if isinstance(pairs, Mask) else None
    want = by_loops(q, k, e, most)
    read = ~torch.isneginf(got)
    torch.testing.assert_close(got[read], want[read], atol=1e-12, rtol=0)
    assert exist is None or torch.equal(read[0, 0], ~torch.isnan(want[0, 0]))


def test_keys_between_count_whatever_the_mask_skips() -> None:
    q, k, v = torch.randn(3, 1, 2, 60, D, dtype=torch.float64)
    e = torch.randn(5, D, dtype=torch.float64)
    text = "causal + window(4) + sink(2) + context_count(4)"
    got = sc.attend(q, k, v, text, params={"context_count": e}, kernel="slab")
    torch.testing.assert_close(got, sc.reference.attend(q, k, v, text, params={"context_count": e}))


def test_it_needs_an_order() -> None:
    with pytest.raises(sc.MechanismError, match="context_count needs key order"):
        sc.mechanism("context_count")
    with pytest.raises(sc.MechanismError, match="most must be a whole number of at least 1, got 0"):
        sc.mechanism("causal + context_count(0)")
