"""S071, A2SF: keys with the most weight received stay, and weight of older queries fades."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.cache import LayerCache, policy
from systems import small_llama
from systems.helpers import qkv
from systems.small_llama import CORPUS, READ, TOLD, text_loss

pytestmark = pytest.mark.system("S071")


def steps(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> list[list[list[int]]]:
    """Reads a text in pieces; the positions that each row holds after every choice."""
    found = []
    for qs, ks, vs in zip(*(x.split(cuts, 2) for x in (q, k, v)), strict=True):
        cache.append(ks, vs)
        cache.attend(qs)
        cache.observe(qs)
        if qs.shape[2] > 1 or cache.due:
            cache.compress(qs)
            assert cache.kept is not None
            places, there = cache.kept.padded()[2:]
            found.append([p[t].tolist() for p, t in zip(places, there, strict=True)])
    return found


def summed(q: Tensor, k: Tensor, a: float) -> Tensor:
    """The explicit sum over queries t of a^(T-t) S_tk, of all heads that share a key, (b, g, n)."""
    b, h, n, d = q.shape
    g = k.shape[1]
    total = torch.zeros(b, g, n, dtype=torch.float64)
    for sample in range(b):
        for head in range(h):
            at = head * g // h
            for t in range(n):
                s = torch.softmax(k[sample, at, : t + 1] @ q[sample, head, t] / d**0.5, 0)
                total[sample, at, : t + 1] += a ** (n - 1 - t) * s
    return total


@pytest.mark.parametrize("a", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("cuts", [[40], [1] * 40, [17, 1, 1, 1, 12, 1, 7], [8] * 5])
def test_the_recursion_equals_the_explicit_sum(a: float, cuts: list[int]) -> None:
    q, k, v = qkv(2, 4, 40, 8, kv=2)
    cache = LayerCache(policy(f"a2sf(keep=1.0, forget={a})"), every=3)
    steps(cache, *(x.float() for x in (q, k, v)), cuts)
    assert cache.mass is not None
    torch.testing.assert_close(cache.mass.double(), summed(q, k, a), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[60], [40, *[1] * 20], [15] * 4])
def test_without_forgetting_it_evicts_as_h2o_index_for_index(cuts: list[int]) -> None:
    q, k, v = qkv(2, 4, 60, 8, kv=2, dtype=torch.float32)
    given = "keep=14, sink=1, recent=3"
    one, two = (
        steps(LayerCache(policy(text), every=1), q, k, v, cuts)
        for text in (f"a2sf({given}, forget=1.0)", f"h2o({given})")
    )
    assert one == two
    other = steps(LayerCache(policy(f"a2sf({given}, forget=0.7)"), every=1), q, k, v, cuts)
    assert other != two


def test_decoding_evicts_the_least_sum_of_those_that_are_held() -> None:
    """One key in, one key out, against a list that is kept by hand."""
    q, k, v = qkv(1, 2, 30, 8, kv=1)
    a, budget = 0.8, 6
    got = steps(
        LayerCache(policy(f"a2sf(keep={budget}, sink=0, recent=1, forget={a})"), every=1), q, k, v, [1] * 30
    )
    sums: dict[int, float] = {}
    for t in range(30):
        sums = {j: a * x for j, x in sums.items()} | {t: 0.0}
        places = list(sums)
        for head in range(2):
            weights = torch.softmax(k[0, 0, places] @ q[0, head, t] / 8**0.5, 0)
            for j, w in zip(places, weights.tolist(), strict=True):
                sums[j] += w
        if len(sums) > budget:
            del sums[min((j for j in sums if j != t), key=sums.__getitem__)]
        assert got[t] == [sorted(sums)]


def test_nothing_remembered_counts_the_last_query_alone() -> None:
    q, k, v = qkv(2, 4, 50, 8, kv=2)
    (got,) = steps(LayerCache(policy("a2sf(keep=9, sink=0, recent=0, forget=0.0)")), q, k, v, [50])
    last = sc.attend(q[:, :, -1:], k, v, "full", need=("weights",)).weights[:, :, 0]
    want = last.unflatten(1, (2, 2)).sum(2).argsort(-1, descending=True)[..., :9].sort(-1).values
    assert got == want.flatten(0, 1).tolist()


def test_forgetting_evens_out_scores_under_uniform_attention() -> None:
    """S_tk = 1/t favours old keys; the ratio of the greatest score to the least shrinks with the factor."""
    n = 64
    zero = torch.zeros(1, 1, n, 4)
    ratios = []
    for a in (1.0, 0.99, 0.9, 0.7, 0.3, 0.0):
        cache = LayerCache(policy(f"a2sf(keep=1.0, forget={a})"))
        steps(cache, zero, zero, zero, [n])
        assert cache.mass is not None
        ratios.append(float(cache.mass.amax() / cache.mass.amin()))
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == pytest.approx(n * sum(1 / t for t in range(1, n + 1)), rel=1e-4)
    assert ratios[-1] == pytest.approx(1)


def test_weight_follows_the_rows_of_a_beam_and_both_phases() -> None:
    q, k, v = qkv(2, 2, 24, 8, kv=1, dtype=torch.float32)
    cache = LayerCache(policy("streaming_llm(keep=20) | a2sf(keep=20, forget=0.8)"))
    assert cache.forgetting == 0.8
    steps(cache, q, k, v, [24])
    before = cache.mass
    cache.select([1, 1, 0])
    assert before is not None
    assert cache.mass is not None
    assert torch.equal(cache.mass, before[[1, 1, 0]])


def beats_h2o(steps: int) -> None:
    """The factor is chosen on other text; at a quarter of the keys the loss is then not above that of h2o."""
    model = small_llama.of_text(steps)
    chosen_on = CORPUS.batch(64, READ + TOLD, torch.Generator().manual_seed(5))
    given = "keep=0.25, sink=2, recent=4"
    factors = (0.9, 0.97, 0.99, 1.0)
    best = min(factors, key=lambda a: text_loss(model, f"a2sf({given}, forget={a})", chosen_on))
    told = CORPUS.windows(READ + TOLD)[:128]
    assert text_loss(model, f"a2sf({given}, forget={best})", told) <= text_loss(model, f"h2o({given})", told)
    assert best < 1


def test_a_model_trained_here_loses_no_more_than_with_h2o() -> None:
    beats_h2o(250)


@pytest.mark.slow
def test_a_model_trained_for_longer_loses_no_more_than_with_h2o() -> None:
    beats_h2o(1600)


def test_bad_factors_are_refused() -> None:
    for a in (-0.1, 1.5):
        with pytest.raises(sc.MechanismError, match="factor of 0 to 1"):
            policy(f"a2sf(forget={a})")
    with pytest.raises(sc.MechanismError, match="both forget alike"):
        LayerCache(policy("h2o | a2sf(forget=0.5)"))
