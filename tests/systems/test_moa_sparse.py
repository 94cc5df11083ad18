"""S261, MoA: a window for each head that grows with the length, chosen from the influence of a trained model's weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from parts.test_mask import claims_hold
from saccade.errors import MechanismError
from saccade.parts.algebra import static_exist
from saccade.systems import moa_search
from saccade.systems.moa_sparse import TABLES, Elastic, HeadSpans, digest, from_json, moa_sparse, to_json
from saccade.tasks.needle import Needle
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import FRESH, dense, qkv, stepwise, train

pytestmark = pytest.mark.system("S261")


@pytest.mark.parametrize(("alpha", "beta"), [(0, 0.0), (3, 0.0), (0, 0.5), (2, 0.3), (1, 1.0), (50, 0.1)])
def test_a_window_is_alpha_and_a_share_of_the_keys_so_far(alpha: int, beta: float) -> None:
    mask = Elastic(alpha, beta)
    found = static_exist(mask, torch.arange(40)[:, None], torch.arange(40)[None])
    for i in range(40):
        span = max(1, min(i + 1, alpha + int(beta * (i + 1))))
        assert found[i].nonzero().flatten().tolist() == list(range(i + 1 - span, i + 1))
        assert mask.span(i + 1) == span
    claims_hold(mask)


@pytest.mark.parametrize("kernel", ["chunk", "slab", None])
def test_each_head_reads_its_own_window_and_the_sinks(kernel: str | None) -> None:
    alpha, beta = (1, 8, 0, 3), (0.0, 0.0, 1.0, 0.25)
    leaves = [x.requires_grad_() for x in qkv(2, 4, 50, 8, kv=2)]
    exist = torch.zeros(4, 50, 50, dtype=torch.bool)
    for h in range(4):
        for i in range(50):
            span = max(1, alpha[h] + int(beta[h] * (i + 1)))
            exist[h, i, max(0, i + 1 - span) : i + 1] = True
            exist[h, i, : min(2, i + 1)] = True
    found = sc.attend(*leaves, moa_sparse(alpha, beta, sinks=2), kernel=kernel)
    truth = dense(*leaves, exist)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), leaves) for x in (found, truth)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(32, 4, "moa_sparse((1, 8, 4, 3), beta=(0, 0.5, 0, 0.25), sinks=1)").double()
    x = torch.randn(2, 43, 32, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_influence_is_the_derivative_along_a_renormalised_removal() -> None:
    logits = torch.randn(6, 6, dtype=torch.float64).masked_fill(
        ~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf
    )
    v, goal = torch.randn(2, 6, 4, dtype=torch.float64)
    weights = logits.softmax(-1)

    def loss(a: Tensor) -> Tensor:
        return (torch.tanh(a @ v) - goal).square().sum()

    grad = torch.func.grad(loss)(weights)
    found = moa_search.influence(weights, grad)
    for i in range(6):
        for j in range(i + 1):
            without = weights.clone()
            without[i, j] = 0
            if i:
                without[i] /= without[i].sum()
            _, slope = torch.func.jvp(
                loss, (weights,), (without - weights if i else torch.zeros_like(weights),)
            )
            assert float(found[i, j]) == pytest.approx(float(slope), abs=1e-10)


def test_the_search_keeps_the_budget_at_every_length_and_spends_it_where_it_counts() -> None:
    lengths = (32, 64)
    far, near, none = {}, {}, {}
    for n in lengths:
        gap = torch.arange(n)[:, None] - torch.arange(n)
        far[n], near[n], none[n] = (
            (gap > n // 2).double(),
            ((gap > 0) & (gap < 4)).double(),
            torch.zeros(n, n),
        )
    profiles = {n: [torch.stack((none[n], far[n])), torch.stack((near[n], none[n]))] for n in lengths}
    found = moa_search.search(profiles, 0.35, alphas=(1, 4, 16), betas=(0.0, 0.5, 1.0))
    assert found.share <= 0.35
    assert found.rules[0][1][1] == 1.0
    assert found.rules[1][0] == (4, 0.0)
    assert found.cost == 0
    tight = moa_search.search(profiles, 0.1, alphas=(1, 4, 16), betas=(0.0, 0.5, 1.0))
    assert tight.share <= 0.1
    assert tight.cost > 0
    with pytest.raises(ValueError, match=r"no rule fits into 0\.01 of the length"):
        moa_search.search(profiles, 0.01)


def test_long_tables_print_a_digest_and_travel_as_json() -> None:
    alpha, beta = tuple(range(1, 17)), tuple(n / 32 for n in range(16))
    m = moa_sparse(alpha, beta)
    text = m.canonical()
    assert len(text) < 80
    assert sc.mechanism(text) == m
    word, held = digest(HeadSpans(alpha, beta)), to_json(m)
    assert word in text
    TABLES.pop(word)
    with pytest.raises(MechanismError, match=f"no table is known by the digest {word}; read it with"):
        HeadSpans(word)
    assert from_json(held) == HeadSpans(alpha, beta)
    assert sc.mechanism(f"moa_sparse({word})") == m
    with pytest.raises(MechanismError, match="it was changed"):
        from_json(held.replace("16]", "17]"))
    short = sc.mechanism("head_spans((4, 8), beta=(0, 0.5)) + causal")
    assert "beta=(0.0, 0.5)" in short.canonical()
    assert sc.mechanism(short.canonical()) == short


def test_bad_arguments() -> None:
    with pytest.raises(MechanismError, match="2 heads have an alpha and 3 a beta"):
        HeadSpans((1, 2), (0.0, 0.0, 0.5))
    with pytest.raises(MechanismError, match="beta must be at most 1"):
        HeadSpans((1, 2), (0.0, 1.5))
    with pytest.raises(MechanismError, match="sinks must be a whole number of at least 0"):
        moa_sparse((1, 2), sinks=-1)
    q = torch.randn(1, 4, 9, 4)
    with pytest.raises(MechanismError, match="its table has 2 heads, the call 4"):
        sc.attend(q, q, q, "moa_sparse((1, 2))")


def planned(seed: int) -> tuple[float, float, float]:
    """Accuracy on a needle whole, under a plan by influence, and under a uniform window of as much span."""
    torch.manual_seed(seed)
    task, generator = Needle(length=64, needles=1, keys=4, values=4), torch.Generator().manual_seed(seed)
    model = sc.nn.Transformer(task.vocab, dim=32, depth=2, heads=2, mechanism="causal", max_length=64)
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(size: int) -> Tensor:
        tokens, targets = task.batch(size, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), lambda step: loss(32), 180, rate=5e-3)
    tokens, targets = task.batch(256, torch.Generator().manual_seed(seed + 1))

    def found() -> float:
        with torch.no_grad():
            return accuracy(model(tokens), targets)

    whole = found()
    profiles = {64: moa_search.profile(model, lambda: loss(128))}
    assert [e.shape for e in profiles[64]] == [(2, 64, 64)] * 2
    assert found() == whole
    chosen = moa_search.search(profiles, 0.3, alphas=(1, 4, 16))
    assert chosen.share <= 0.3
    layer, head = max(
        ((n, h) for n in range(2) for h in range(2)),
        key=lambda at: float(profiles[64][at[0]][at[1]].tril(-1).sum()),
    )
    assert chosen.rules[layer][head][1] > 0
    for block, rules in zip(model.blocks, chosen.rules, strict=True):
        alpha, beta = zip(*rules, strict=True)
        block.attention.mechanism = moa_sparse(alpha, beta, sinks=0)
    by_plan = found()
    for block in model.blocks:
        block.attention.mechanism = sc.mechanism(f"window({int(64 * chosen.share) + 1})")
    return whole, by_plan, found()


def test_a_plan_by_influence_keeps_the_needle_that_a_uniform_window_loses() -> None:
    whole, by_plan, uniform = planned(FRESH)
    assert whole > 0.9
    assert by_plan >= uniform + 0.15
