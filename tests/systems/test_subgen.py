"""S180, SubGen: clustered keys give the denominator, values sampled by their norm the numerator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.cache import LayerCache, layer_cache, policy
from saccade.cache.subgen import Sketch, SketchCache
from systems import small_llama
from systems.helpers import qkv

from saccade import hf  # isort: skip

pytestmark = pytest.mark.system("S180")


def sketch(k: Tensor, v: Tensor, delta: float, samples: int, values: int, seeds: int = 1) -> Sketch:
    """The same text (n, .) in `seeds` rows, which draw apart."""
    made = Sketch(delta, samples, values, torch.Generator().manual_seed(0))
    made.add(k.expand(seeds, -1, -1), v.expand(seeds, -1, -1))
    return made


def parts(made: Sketch, q: Tensor) -> tuple[Tensor, Tensor]:
    """Estimated denominators (R,) and numerators (R, e) of one query (d,)."""
    out, lse = made.read(q.expand(len(made.used), 1, 1, -1))
    return lse.exp().flatten(), (out * lse.exp().unsqueeze(-1)).flatten(0, 2)


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (k @ q / math.sqrt(len(q))).exp()
    return weights.sum(), weights @ v


def planted(n: int, centres: int = 16, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """A query, and keys close around few centres that stand far apart."""
    middle = 4 * F.normalize(torch.randn(centres, d, dtype=torch.float64), dim=-1)
    which = torch.cat((torch.arange(centres), torch.randint(centres, (n - centres,))))
    k = (
        middle[which]
        + 0.1 * F.normalize(torch.randn(n, d, dtype=torch.float64), dim=-1) * torch.rand(n, 1).double()
    )
    return torch.randn(d).double(), k, torch.randn(n, 6).double() * torch.rand(n, 1).double()


def test_numerator_and_denominator_are_unbiased() -> None:
    """Over 2,000 seeds, within 3 standard errors; clusters so wide that their samples matter."""
    k, v = torch.randn(60, 8).double(), torch.randn(60, 5).double()
    q = torch.randn(8).double()
    made = sketch(k, v, delta=3.0, samples=3, values=8, seeds=2000)
    assert 1 < made.clusters[0] < 30
    for got, want in zip(parts(made, q), exact(q, k, v), strict=True):
        error = got.std(0) / 2000**0.5
        assert (error > 0).all()
        assert ((got.mean(0) - want).abs() < 3 * error).all()


@pytest.mark.parametrize("n", [150, 1500])
def test_planted_clusters_are_found_however_long_the_text(n: int) -> None:
    _, k, v = planted(n)
    made = sketch(k, v, delta=0.5, samples=2, values=16)
    assert made.clusters == (16,)
    assert made.nbytes == 8 * (16 * (8 + 2 * 8 + 1) + 16 * (8 + 6) + 2)
    assert int(made.members.sum()) == n


def test_error_falls_as_one_over_the_root_of_the_samples() -> None:
    q, k, v = planted(200)
    v = v / v.norm(dim=-1, keepdim=True) * (0.5 + torch.rand(200, 1))
    want = exact(q, k, v)[1]
    errors = [
        float((parts(sketch(k, v, 0.5, 2, s, seeds=600), q)[1] - want).square().mean().sqrt())
        for s in (8, 32, 128)
    ]
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert 1.7 < fewer / more < 2.3


def test_without_a_distance_every_key_is_a_cluster_and_the_denominator_exact() -> None:
    q, k, v = planted(80)
    made = sketch(k, v, delta=0.0, samples=3, values=4)
    assert made.clusters == (80,)
    torch.testing.assert_close(parts(made, q)[0][0], exact(q, k, v)[0], atol=0, rtol=1e-12)
    twice = sketch(k.repeat(2, 1), v.repeat(2, 1), delta=0.0, samples=3, values=4)
    assert twice.clusters == (80,)
    torch.testing.assert_close(parts(twice, q)[0][0], 2 * exact(q, k, v)[0], atol=0, rtol=1e-12)


def test_each_step_equals_the_algorithm_with_the_same_draws() -> None:
    """Clusters, samples and values of one row, in lists, from the same generator."""
    k, v = torch.randn(40, 4).double(), torch.randn(40, 3).double()
    made = sketch(k, v, delta=1.5, samples=2, values=3)
    generator = torch.Generator().manual_seed(0)
    centres: list[Tensor] = []
    members: list[int] = []
    drawn: list[list[Tensor]] = []
    kept: list[tuple[Tensor, Tensor]] = [(k[0], v[0])] * 3
    total = 0.0
    for key, value in zip(k, v, strict=True):
        near = min(range(len(centres)), key=lambda i: float((centres[i] - key).norm()), default=-1)
        if near < 0 or float((centres[near] - key).norm()) > 1.5:
            near = len(centres)
            centres.append(key)
            members.append(0)
            drawn.append([key, key])
        members[near] += 1
        for j, u in enumerate(torch.rand(2, generator=generator, dtype=torch.float64).tolist()):
            if u < 1 / members[near]:
                drawn[near][j] = key
        total += float(value @ value)
        for j, u in enumerate(torch.rand(3, generator=generator, dtype=torch.float64).tolist()):
            if u < float(value @ value) / total:
                kept[j] = key, value
    assert torch.equal(made.centres[0], torch.stack(centres))
    assert made.members[0].tolist() == members
    assert torch.equal(made.drawn[0], torch.stack([torch.stack(x) for x in drawn]))
    assert torch.equal(made.keys[0], torch.stack([x for x, _ in kept]))
    assert torch.equal(made.found[0], torch.stack([x for _, x in kept]))


def run(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> Tensor:
    outs = []
    for qs, ks, vs in zip(*(x.split(cuts, 2) for x in (q, k, v)), strict=True):
        cache.append(ks, vs)
        outs.append(cache.attend(qs))
        if qs.shape[2] > 1 or cache.due:
            cache.compress(qs)
    return torch.cat(outs, 2)


def test_a_layers_cache_reads_what_is_exact_beside_the_sketch() -> None:
    """First and latest tokens exactly, the others within the noise of many samples; a short text is all exact."""
    q, k, v = qkv(2, 4, 120, 8, kv=2)
    want = sc.attend(q, k, v, "causal")
    errors = []
    for keep in (1000, 4000):
        cache = layer_cache(policy(f"subgen(keep={keep}, delta=0.0, sink=3, recent=10)"), every=20)
        got = run(cache, q, k, v, [80, *[1] * 40])
        torch.testing.assert_close(got[:, :, :80], want[:, :, :80], atol=1e-10, rtol=0)
        errors.append(float((got - want)[:, :, 80:].norm() / want[:, :, 80:].norm()))
        assert isinstance(cache, SketchCache)
        assert cache.kept is not None
        assert cache.kept.counts == (3,) * 4
    assert errors[1] < 0.2
    assert 1.5 < errors[0] / errors[1] < 2.7
    short = layer_cache(policy("subgen(recent=30)"), every=200)
    torch.testing.assert_close(
        run(short, *(x[:, :, :30] for x in (q, k, v)), [20, *[1] * 10]), want[:, :, :30]
    )


def test_bytes_stay_while_the_text_grows() -> None:
    held = []
    for n in (400, 1600):
        _, k, v = planted(n)
        cache = layer_cache(policy("subgen(keep=32, delta=0.5, samples=2, sink=2, recent=8)"))
        run(cache, k[None, None], k[None, None], v[None, None], [n])
        held.append((cache.nbytes, cache.counts))
    assert held[0] == held[1]
    assert held[0][1] == (16 * 2 + 32 + 2 + 8,)


def test_padding_poison_and_values_of_nothing() -> None:
    k, v = torch.randn(2, 1, 30, 4), torch.randn(2, 1, 30, 4)
    there = torch.ones(2, 30, dtype=torch.bool)
    there[0, :12] = False
    poisoned = [x.masked_fill(~there[:, None, :, None], torch.nan) for x in (k, v)]
    found = []
    for ks, vs, held in ((*poisoned, there), (k[:1, :, 12:], v[:1, :, 12:], None)):
        cache = layer_cache(policy("subgen(delta=0.0, sink=1, recent=5, keep=20)"))
        cache.append(ks, vs, held)
        cache.compress(ks)
        assert isinstance(cache, SketchCache)
        assert cache.attend(torch.randn(len(ks), 1, 1, 4)).isfinite().all()
        found.append(cache)
    assert found[0].sketch.clusters == (12, 24)
    assert torch.equal(found[0].sketch.centres[0, :12], found[1].sketch.centres[0])
    empty = sketch(torch.randn(5, 4), torch.zeros(5, 4), 0.0, 1, 4)
    assert torch.equal(empty.read(torch.randn(1, 1, 2, 4))[0], torch.zeros(1, 1, 2, 4))


def test_rows_follow_a_beam() -> None:
    q, k, v = qkv(2, 2, 40, 4, kv=1)
    one, two = (
        layer_cache(policy("subgen(keep=24, delta=1.0, recent=4, sink=1)"), every=100) for _ in range(2)
    )
    for cache in (one, two):
        run(cache, q, k, v, [40])
    two.select([1, 1, 0])
    new = qkv(2, 2, 1, 4, kv=1)
    one.append(*new[1:])
    two.append(*(x[[1, 1, 0]] for x in new[1:]))
    torch.testing.assert_close(two.attend(new[0][[1, 1, 0]]), one.attend(new[0])[[1, 1, 0]])


def test_a_model_writes_with_it() -> None:
    model, x = small_llama.llama(64).eval(), torch.randint(64, (2, 70))
    ask: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with hf.compress(model, "subgen(keep=24, delta=100.0, samples=2)") as held:
        made = model.generate(x, num_beams=2, **ask)
        assert made.shape == (2, 76)
        assert held.cache is not None
        assert held.cache.nbytes < 0.75 * 2 * 2 * 2 * 2 * 75 * 2 * 16 * 4
    with hf.compress(model, "subgen(recent=200, keep=300)"):
        assert torch.equal(model.generate(x, **ask), model.generate(x, **ask))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(sc.MechanismError, match="keep is a number of sampled values"):
        policy("subgen(keep=0.5)")
    with pytest.raises(sc.MechanismError, match="delta is a distance"):
        policy("subgen(delta=-1.0)")
    with pytest.raises(sc.MechanismError, match="samples at least 1"):
        policy("subgen(samples=0)")
    q, k, v = qkv(1, 2, 30, 4)
    with pytest.raises(sc.NotSupported, match="subgen for all phases"):
        run(layer_cache(policy("subgen | snapkv")), q, k, v, [30])
