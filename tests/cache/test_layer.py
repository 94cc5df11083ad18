"""A layer's cache: with all kept it is full attention, and what is dropped is really gone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.cache import LayerCache, Segments, Sight, policy
from saccade.cache.evict import AdaKV
from saccade.errors import MechanismError

B, H, G, D = 2, 4, 2, 8
POLICIES = [
    "streaming_llm",
    "l2_norm",
    "snapkv",
    "tova",
    "h2o",
    "pyramidkv",
    "adakv",
    "at_random",
    "a2sf",
    "expected_attention",
]


def qkv(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, n, D, generator=generator)
    k, v = (torch.randn(B, G, n, D, generator=generator) for _ in range(2))
    return q, k, v


def run(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> Tensor:
    """Pieces of a text, compressed after those of more than one token and when due."""
    outs = []
    for qs, ks, vs in zip(*(x.split(cuts, 2) for x in (q, k, v)), strict=True):
        cache.append(ks, vs)
        outs.append(cache.attend(qs))
        cache.observe(qs)
        if qs.shape[2] > 1 or cache.due:
            cache.compress(qs)
    return torch.cat(outs, 2)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("cuts", [[40], [17, 1, 1, 1, 1, 19], [8] * 5, [30, *[1] * 10]])
def test_keeping_all_is_full_attention(name: str, cuts: list[int]) -> None:
    q, k, v = qkv(40)
    made = policy(f"{name}(keep=1.0)") if name != "pyramidkv" else policy("pyramidkv(keep=1.0, slope=1.0)")
    cache = LayerCache(made, every=4)
    torch.testing.assert_close(run(cache, q, k, v, cuts), sc.attend(q, k, v, "causal"), atol=2e-6, rtol=2e-6)
    assert cache.counts == (40,) * (B * G)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("keep", [0.25, 30])
def test_budgets_are_kept_and_bytes_fall(name: str, keep: float) -> None:
    q, k, v = qkv(120)
    cache = LayerCache(policy(f"{name}(keep={keep}, sink=2, recent=8)"))
    run(cache, q, k, v, [120])
    want = 30 * B * G
    if name != "pyramidkv":
        assert sum(cache.counts) == want
    expected = sum(cache.counts) * (2 * D * 4 + 8)
    assert cache.kept is not None
    assert cache.kept.nbytes == expected
    assert cache.kept.keys.untyped_storage().nbytes() == sum(cache.counts) * D * 4
    p = cache.kept.padded()[2].unflatten(0, (B, G))
    assert (p[..., :2] == torch.tensor([0, 1])).all()
    if name != "pyramidkv" and name != "adakv":
        assert (p[..., -8:] == torch.arange(112, 120)).all()


def test_kept_keys_are_read_with_the_tokens_since() -> None:
    """After dropping, the output is softmax over exactly the kept keys and the new ones."""
    q, k, v = qkv(60)
    cache = LayerCache(policy("l2_norm(keep=20, sink=2, recent=4)"), every=100)
    got = run(cache, q, k, v, [50, *[1] * 10])[:, :, 50:]
    assert cache.kept is not None
    kept = cache.kept.padded()[2].unflatten(0, (B, G))
    mask = torch.zeros(B, G, 10, 60, dtype=torch.bool)
    mask.scatter_(3, kept.unsqueeze(2).expand(-1, -1, 10, -1), True)
    mask |= (torch.arange(60) >= 50) & (torch.arange(60) <= torch.arange(50, 60)[:, None])
    want = sc.attend(q[:, :, 50:], k, v, "full", mask=mask.repeat_interleave(H // G, 1))
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


def test_scores_by_hand() -> None:
    q, k, v = qkv(20)
    norms = k.norm(dim=-1)
    cache = LayerCache(policy("l2_norm(keep=5, sink=0, recent=0)"))
    run(cache, q, k, v, [20])
    assert cache.kept is not None
    got = cache.kept.padded()[2].unflatten(0, (B, G))
    assert torch.equal(got, norms.argsort(-1)[..., :5].sort(-1).values)
    heavy = LayerCache(policy("h2o(keep=5, sink=0, recent=0)"))
    run(heavy, q, k, v, [20])
    mass = sc.attend(q, k, v, "causal", need=("mass",)).mass
    assert mass is not None
    want = mass.unflatten(1, (G, H // G)).mean(2).argsort(-1, descending=True)[..., :5].sort(-1).values
    assert heavy.kept is not None
    assert torch.equal(heavy.kept.padded()[2].unflatten(0, (B, G)), want)


def test_heads_that_share_a_budget_keep_their_best_keys() -> None:
    """Keys that always stay come first in each head's part, so that its best key competes with those of other heads."""
    worth = torch.stack((torch.zeros(40), torch.rand(40) + 1))[None]
    worth[0, 0, 20] = 100.0

    class Given(AdaKV):
        def scores(self, sight: Sight) -> Tensor:
            return worth

    k = torch.randn(1, 2, 40, 4)
    places, there = torch.arange(40).expand(1, 2, 40), torch.ones(1, 2, 40, dtype=torch.bool)
    kept = Given(keep=10, sink=2, recent=4, floor=0.1).chosen(Sight(k, k, places, there, k, 40))[0]
    fixed = {0, 1, 36, 37, 38, 39}
    assert set(kept[0].nonzero().flatten().tolist()) == fixed | {20}
    best = [j for j in worth[0, 1].argsort(descending=True).tolist() if j not in fixed][:7]
    assert set(kept[1].nonzero().flatten().tolist()) == fixed | set(best)


def test_mass_goes_on_after_a_choice() -> None:
    q, k, v = qkv(40)
    whole, pieces = (LayerCache(policy("h2o(keep=1.0, sink=0, recent=0)"), every=3) for _ in range(2))
    run(whole, q, k, v, [40])
    run(pieces, q, k, v, [11, 1, 1, 1, 1, 1, 24])
    assert whole.mass is not None
    assert pieces.mass is not None
    torch.testing.assert_close(whole.mass, pieces.mass, atol=1e-5, rtol=1e-5)


def test_padding_is_never_kept() -> None:
    q, k, v = qkv(24)
    there = torch.ones(B, 24, dtype=torch.bool)
    there[0, :9] = False
    cache = LayerCache(policy("streaming_llm(keep=12, sink=2, recent=4)"))
    cache.append(k.masked_fill(~there[:, None, :, None], torch.nan), v, there)
    cache.compress(q)
    assert cache.kept is not None
    assert cache.kept.keys.isfinite().all()
    first = cache.kept.padded()[2].unflatten(0, (B, G))[..., :2]
    assert first[0].tolist() == [[9, 10]] * G
    assert first[1].tolist() == [[0, 1]] * G


def test_rows_follow_a_beam() -> None:
    q, k, v = qkv(30)
    one, two = (LayerCache(policy("adakv(keep=12, sink=1, recent=2, window=4)"), every=100) for _ in range(2))
    for cache in (one, two):
        run(cache, q, k, v, [30])
    two.select([1, 1, 0])
    more = qkv(1, seed=5)
    one.append(*more[1:])
    out = one.attend(more[0])
    order = [1, 1, 0]
    two.append(*(x[order] for x in more[1:]))
    torch.testing.assert_close(two.attend(more[0][order]), out[order])


def test_segments_spend_nothing_on_short_rows() -> None:
    k, v = torch.randn(1, 3, 10, 4), torch.randn(1, 3, 10, 4)
    keep = torch.zeros(1, 3, 10, dtype=torch.bool)
    keep[0, 0, :7], keep[0, 2, 4] = True, True
    made = Segments.kept(k, v, torch.arange(10).expand(1, 3, 10), keep)
    assert made.counts == (7, 0, 1)
    q = torch.randn(1, 6, 2, 4)
    found = made.read(q)
    assert found is not None
    want = sc.attend(q, k, v, "full", mask=keep.repeat_interleave(2, 1)[:, :, None], need=("out", "lse"))
    torch.testing.assert_close(found[0], want.out)
    torch.testing.assert_close(found[1], want.lse)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("snapkv(keep=0.0)", "keep is a share"),
        ("snapkv(keep=1.5)", "keep is a share"),
        ("snapkv(keep=0)", "keep is a share"),
        ("snapkv(keep=10)", "do not hold"),
        ("snapkv(kernel=4)", "odd"),
        ("snapkv(size=4)", "size"),
        ("nothing", "there are"),
        ("snapkv(", "no policy"),
        ("1 + 2", "no policy"),
    ],
)
def test_bad_texts_are_refused(text: str, says: str) -> None:
    with pytest.raises(MechanismError, match=says):
        policy(text)


@pytest.mark.parametrize("text", ["snapkv(keep=0.5)", "adakv(keep=100, floor=0.1)", "h2o | tova(keep=64)"])
def test_texts_round_trip(text: str) -> None:
    assert str(policy(text)) == text
    assert policy(str(policy(text))) == policy(text)
