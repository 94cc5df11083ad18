"""Scores against plain loops over pairs and channels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from parts import tools
from saccade.parts.base import Sizes
from saccade.parts.score import Additive, Bilinear, Dot, Score, grouped_matmul

B, H, G, L, S, D = 2, 4, 2, 3, 5, 6


def vectors(groups: int = G) -> tuple[Tensor, Tensor]:
    return torch.randn(B, H, L, D, dtype=torch.float64), torch.randn(B, groups, S, D, dtype=torch.float64)


def logits(score: Score, q: Tensor, k: Tensor, params: dict[str, Tensor]) -> Tensor:
    return tools.logits(sc.Pairwise(score=score), q, k, params=params)


def pairs(groups: int = G) -> itertools.product[tuple[int, ...]]:
    return itertools.product(range(B), range(H), range(L), range(S))


def test_dot() -> None:
    q, k = vectors()
    for score, scale in ((Dot(), 1 / math.sqrt(D)), (Dot(scale=2.5), 2.5)):
        got = logits(score, q, k, {})
        for b, h, i, j in pairs():
            want = scale * sum(q[b, h, i, c].item() * k[b, h * G // H, j, c].item() for c in range(D))
            assert got[b, h, i, j].item() == pytest.approx(want, abs=1e-12)


def test_bilinear() -> None:
    q, k = vectors()
    w = torch.randn(H, D, D, dtype=torch.float64)
    got = logits(Bilinear(), q, k, {"bilinear": w})
    for b, h, i, j in pairs():
        want = sum(
            q[b, h, i, r].item() * w[h, r, c].item() * k[b, h * G // H, j, c].item()
            for r in range(D)
            for c in range(D)
        )
        assert got[b, h, i, j].item() == pytest.approx(want, abs=1e-12)


def test_bilinear_with_the_identity_is_the_plain_dot() -> None:
    q, k = vectors()
    params = {"bilinear": torch.eye(D, dtype=torch.float64).expand(H, D, D)}
    torch.testing.assert_close(logits(Bilinear(), q, k, params), logits(Dot(scale=1.0), q, k, {}))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_additive(groups: int) -> None:
    q, k = vectors(groups)
    a = 3
    wq = torch.randn(H, D, a, dtype=torch.float64)
    wk = torch.randn(groups, D, a, dtype=torch.float64)
    v = torch.randn(H, a, dtype=torch.float64)
    got = logits(Additive(a), q, k, {"additive_q": wq, "additive_k": wk, "additive_v": v})
    for b, h, i, j in pairs():
        g = h * groups // H
        want = 0.0
        for n in range(a):
            inner = sum(
                wq[h, c, n].item() * q[b, h, i, c].item() + wk[g, c, n].item() * k[b, g, j, c].item()
                for c in range(D)
            )
            want += v[h, n].item() * math.tanh(inner)
        assert got[b, h, i, j].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_matmul_shares_heads_by_floor(groups: int) -> None:
    q, k = vectors(groups)
    got = grouped_matmul(q, k.transpose(-1, -2))
    for h in range(H):
        torch.testing.assert_close(got[:, h], q[:, h] @ k[:, h * groups // H].transpose(-1, -2))


@pytest.mark.parametrize("score", [Dot(), Dot(scale=0.5), Bilinear(), Additive(4)])
def test_a_factored_score_is_the_dot_product_of_what_it_prepares(score: Score) -> None:
    q, k = vectors(H)
    params = {
        n: torch.randn(w.shape, dtype=torch.float64) for n, w in score.weights(Sizes(H, H, D, D)).items()
    }
    program = tools.bound(sc.Pairwise(score=score), q, k, params=params)
    dot = program.q @ program.k.transpose(-1, -2) if program.q.shape == (B, H, L, D) else None
    agrees = dot is not None and torch.allclose(dot, score.tile(tools.tile(program)))
    assert agrees == score.factored


@pytest.mark.parametrize("score", [Dot(), Bilinear(), Additive(4)])
def test_a_tile_is_a_cut_of_the_whole(score: Score) -> None:
    q, k = vectors()
    params = {
        n: torch.randn(w.shape, dtype=torch.float64) for n, w in score.weights(Sizes(H, G, D, D)).items()
    }
    program = tools.bound(sc.Pairwise(score=score), q, k, params=params)
    whole = score.tile(tools.tile(program))
    part = tools.tile(program, slice(1, L), (2, 4))
    torch.testing.assert_close(score.tile(part), whole[:, :, 1:, 2:4])


def test_declared_weights_have_the_shapes_that_are_used() -> None:
    for text in ("bilinear", "additive(7)"):
        layer = sc.nn.Attention(24, 4, text + " + kv_heads(2)")
        layer(torch.randn(1, 5, 24)).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
