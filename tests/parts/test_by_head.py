"""Masks that differ between heads: each head as if it were alone, by every kernel and in decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import saccade as sc
from saccade.parts.algebra import Mask, Pairs
from saccade.parts.base import NAMES, PARTS, arg
from saccade.parts.mask import Causal, Sink, Window


@dataclass(frozen=True)
class Widths(Mask):
    """Head h reads `width` (h // 2 + 1) keys."""

    width: int = arg(3, at_least=1)

    looks_back = True
    by_head = True

    def at(self, head: int, heads: int) -> Pairs:
        return Window(self.width * (head // 2 + 1))


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    yield
    assert not {"widths"} & (NAMES.keys() | PARTS.keys())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("extra", [None, Sink(2)])
def test_each_head_runs_as_if_it_were_alone(groups: int, extra: Pairs | None) -> None:
    pairs = Causal() & (Widths() if extra is None else Widths() | extra)
    m = sc.Pairwise(pairs=pairs)
    q = torch.randn(2, 4, 50, 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, groups, 50, 8, dtype=torch.float64)
    got = sc.attend(q, k, v, m)
    for h in range(4):
        g = h * groups // 4
        alone = sc.Pairwise(pairs=pairs.at(h, 4))
        want = sc.attend(q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1], alone)
        torch.testing.assert_close(got[:, h : h + 1], want)
    torch.testing.assert_close(sc.reference.attend(q, k, v, m), got)
    (grad,) = torch.autograd.grad(got.square().sum(), q)
    (truth,) = torch.autograd.grad(sc.reference.attend(q, k, v, m).square().sum(), q)
    torch.testing.assert_close(grad, truth)


def test_heads_that_read_the_same_run_together() -> None:
    p = sc.plan(sc.Pairwise(pairs=Causal() & Widths()), (1, 6, 1024, 64))
    assert p.heads == ((0, 1), (2, 3), (4, 5))
    assert p.kernel in ("per head(native, native, native)", "per head(chunk, chunk, chunk)")
    parts = [sc.plan(f"causal + window({w})", (1, 2, 1024, 64)).cost.flops for w in (3, 6, 9)]
    assert p.cost.flops == sum(parts)


def test_decoding_follows_each_head() -> None:
    m = sc.Pairwise(pairs=Causal() & Widths())
    q, k, v = torch.randn(3, 1, 4, 20, 8, dtype=torch.float64)
    whole, rows, state = sc.attend(q, k, v, m), [], None
    for t in range(20):
        at = (slice(None), slice(None), slice(t, t + 1))
        found = sc.attend(q[at], k[at], v[at], m, state=state, need=("out", "state"))
        state = found.state
        rows.append(found.out)
    torch.testing.assert_close(torch.cat(rows, 2), whole)


def test_weights_mixed_over_heads_need_the_same_pairs_in_all_of_them() -> None:
    part = sc.mechanism("head_mix(2)").reweight  # type: ignore[union-attr]
    with pytest.raises(sc.NotSupported, match="head_mix mixes heads"):
        sc.plan(sc.Pairwise(pairs=Causal() & Widths(), reweight=part), (1, 4, 16, 8))
