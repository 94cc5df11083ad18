"""S136, PMA-Net: attention beside prototypes of the keys and values that recent batches held."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.nn.prototypes import kmeans
from saccade.tasks.digits import Digits
from systems.helpers import below

pytestmark = pytest.mark.system("S136")
DIM, HEADS = 12, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(n: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.float64)


def layer(mechanism: str = "full", count: int = 5, batches: int = 3) -> sc.nn.PrototypeAttention:
    torch.manual_seed(0)
    made = sc.nn.PrototypeAttention(
        DIM, HEADS, mechanism, count=count, batches=batches, neighbours=2
    ).double()
    if count:
        made.mark_key.data *= 20
        made.mark_value.data *= 20
    return made


def filled(mechanism: str = "full", count: int = 5) -> sc.nn.PrototypeAttention:
    made = layer(mechanism, count)
    made.remember(tokens(9))
    made.refresh(generator())
    return made


def written_out(m: sc.nn.PrototypeAttention, x: Tensor, exist: Tensor | None = None) -> Tensor:
    """One softmax over the concatenation [K; Mk + seg], [V; Mv + seg]."""
    q, k, v = m.attention.project(x)
    groups = HEADS // k.shape[1]
    known_k, known_v = m.prototype_keys + m.mark_key, m.prototype_values + m.mark_value
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(HEADS):
            keys, values = (
                torch.cat((y[b, h // groups], z[h // groups])) for y, z in ((k, known_k), (v, known_v))
            )
            for i in range(x.shape[1]):
                s = keys @ q[b, h, i] / math.sqrt(q.shape[-1])
                if exist is not None:
                    s = s.masked_fill(~F.pad(exist[i], (0, m.count), value=True), -math.inf)
                out[b, h, i] = torch.softmax(s, 0) @ values
    return m.attention.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mechanism", ["full", "causal", "gqa(1)", "gqa(3) + window(3)"])
def test_equals_a_softmax_over_the_concatenation_and_its_gradients(mechanism: str) -> None:
    m, x = filled(mechanism), tokens(7).requires_grad_()
    exist = None
    if "causal" in mechanism or "window" in mechanism:
        exist = below(7) & (~below(7).tril(-3) if "window" in mechanism else True)
    found, truth = m(x), written_out(m, x, exist)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    wanted = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (found, truth)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mechanism", ["full", "causal + rope"])
def test_no_prototypes_are_ordinary_attention(mechanism: str) -> None:
    x, poor = tokens(8), layer(mechanism, count=0)
    poor.remember(x)
    poor.refresh()
    torch.testing.assert_close(poor(x), poor.attention(x), atol=0, rtol=0)
    assert {name.split(".")[0] for name, _ in poor.named_parameters()} == {"attention"}
    fresh = layer(mechanism)
    torch.testing.assert_close(fresh(x), fresh.attention(x), atol=1e-12, rtol=0)
    assert (torch.autograd.grad(fresh(x).sum(), fresh.mark_key)[0] == 0).all()


def test_prototypes_change_by_refresh_alone_and_pass_no_gradient() -> None:
    m, x = filled(), tokens(6)
    before = {n: y.clone() for n, y in m.named_buffers()}
    m(x).sum().backward()
    m.remember(x)
    assert all(torch.equal(y, before[n]) for n, y in m.named_buffers())
    assert not m.prototype_keys.requires_grad
    m.refresh(generator())
    assert not torch.equal(m.prototype_keys, before["prototype_keys"])
    assert m.mark_key.grad is not None
    assert m.mark_key.grad.abs().max() > 0


def test_the_bank_holds_the_last_batches_without_padding() -> None:
    m = layer(batches=2)
    for n in (5, 6, 7):
        x = tokens(n)
        x[1, 3:] = math.nan
        m.remember(x, key_lengths=torch.tensor([n, 3]))
    assert [k.shape[1] for k, _ in m.bank] == [6 + 3, 7 + 3]
    k, _ = m.attention.keys_values(x[:1])
    torch.testing.assert_close(m.bank[-1][0][:, :7], k[0], atol=1e-12, rtol=0)
    m.refresh(generator())
    assert m.prototype_keys.isfinite().all()


def test_a_state_dict_brings_the_prototypes() -> None:
    m, x = filled(), tokens(6)
    other = sc.nn.PrototypeAttention(DIM, HEADS, count=5).double()
    other.load_state_dict(m.state_dict())
    torch.testing.assert_close(other(x), m(x), atol=0, rtol=0)


@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6]])
def test_decoding_equals_the_whole_call(count: int, pieces: list[int]) -> None:
    m, x = filled("causal + rope", count), tokens(11)
    state, outs = m.init_state(2), []
    for piece in x.split(pieces, 1):
        y, state = m.step(piece, state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), m(x), atol=1e-12, rtol=0)


def test_padding_reaches_nothing() -> None:
    m, x, lengths = filled(), tokens(9, batch=3), torch.tensor([9, 4, 0])
    poisoned = x.clone()
    poisoned[1, 4:], poisoned[2] = math.nan, math.nan
    found = m(poisoned, key_lengths=lengths)
    torch.testing.assert_close(found[0], m(x[:1])[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1, :4], m(x[1:2, :4])[0], atol=1e-12, rtol=0)
    assert (found[1, 4:] == 0).all()
    assert (found[2] == 0).all()
    grads = torch.autograd.grad(found.sum(), list(m.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_cross_attention_and_an_empty_context() -> None:
    m = sc.nn.PrototypeAttention(DIM, HEADS, count=4, context_dim=5).double()
    x, context = tokens(3), torch.randn(2, 8, 5, dtype=torch.float64)
    m.remember(x, context)
    m.refresh(generator())
    found = m(x, context, key_lengths=torch.tensor([8, 0]))
    torch.testing.assert_close(found[0], m(x[:1], context[:1])[0], atol=1e-12, rtol=0)
    q, k, v = m.attention.project(x[1:], context[1:])
    k, v = m.prototype_keys + m.mark_key, m.prototype_values + m.mark_value
    alone = m.attention.out_proj(sc.attend(q, k[None], v[None], "full").transpose(1, 2).flatten(2))
    torch.testing.assert_close(found[1:], alone, atol=1e-12, rtol=0)


def test_values_are_means_of_the_nearest_keys() -> None:
    keys, values = torch.randn(2, 30, 4, dtype=torch.float64), torch.randn(2, 30, 3, dtype=torch.float64)
    found_k, found_v = sc.nn.prototypes(keys, values, 6, neighbours=5, generator=generator())
    for g in range(2):
        for c, value in zip(found_k[g], found_v[g], strict=True):
            near = sorted(range(30), key=lambda j, c=c, g=g: float((keys[g, j] - c).norm()))[:5]
            w = [math.exp(-float((keys[g, j] - c).norm())) for j in near]
            truth = sum(a * values[g, j] for a, j in zip(w, near, strict=True)) / sum(w)
            torch.testing.assert_close(value, truth, atol=1e-12, rtol=0)


def test_each_centre_is_the_mean_of_its_points() -> None:
    x = torch.randn(2, 60, 3, dtype=torch.float64)
    centres = kmeans(x, 7, generator())
    for points, found in zip(x, centres, strict=True):
        own = torch.stack([(points - c).norm(dim=-1) for c in found]).argmin(0)
        for n, c in enumerate(found):
            torch.testing.assert_close(c, points[own == n].mean(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_recovered(seed: int) -> None:
    g = generator(seed)
    planted = F.normalize(torch.randn(2, 8, 16, generator=g), dim=-1)
    spread = 0.02 * torch.randn(2, 8, 40, 16, generator=g)
    points = (planted.unsqueeze(2) + spread).flatten(1, 2)
    order = torch.rand(2, 320, generator=g).argsort(1).unsqueeze(-1).expand_as(points)
    centres, _ = sc.nn.prototypes(points.gather(1, order), points, 8, generator=g)
    assert float(torch.cdist(planted, centres).amin(-1).max()) <= 0.05


def test_identical_points_and_as_many_centres_as_points() -> None:
    same = torch.ones(1, 6, 2, dtype=torch.float64)
    assert (kmeans(same, 3, generator()) == 1).all()
    x = torch.randn(1, 6, 2, dtype=torch.float64)
    assert float(torch.cdist(x, kmeans(x, 6, generator())).amin(-1).max()) < 1e-12


def test_clusters_are_as_tight_as_those_of_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    images = Digits().parts[0].flatten(1)
    ours = [
        float(torch.cdist(images, kmeans(images[None], 50, generator(n))[0]).amin(-1).square().sum())
        for n in range(3)
    ]
    theirs = [
        cluster.KMeans(50, n_init=1, random_state=n).fit(images.double().numpy()).inertia_ for n in range(3)
    ]
    assert sum(ours) <= 1.02 * sum(theirs)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_are_read_from_50_prototypes(seed: int) -> None:
    """A memory of pixels and labels that past batches brought, read by attention alone; nothing is trained."""
    pytest.importorskip("sklearn")
    task = Digits(seed=seed)
    images, labels, test, answers = task.parts
    keys, values = images.flatten(1)[None], F.one_hot(labels, 10).float()[None]
    memory = sc.nn.prototypes(keys, values, 50, generator=generator(seed))
    found = sc.attend(test.flatten(1)[None, None], *(y[None] for y in memory), "unit + dot(scale=32)")[0, 0]
    assert float((found.argmax(-1) == answers).float().mean()) >= 0.9 > task.chance + 0.7


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match="count must be at least 0, batches and neighbours at least 1, got -1"
    ):
        sc.nn.PrototypeAttention(12, 3, count=-1)
    with pytest.raises(sc.NotSupported, match=r"bilinear has weights.*take one without"):
        sc.nn.PrototypeAttention(12, 3, "bilinear")
    with pytest.raises(ValueError, match="the bank holds 0 keys, fewer than the 5 prototypes"):
        layer().refresh()
    with pytest.raises(
        ValueError, match=r"4 keys have 1 to 4 prototypes .* got 5 prototypes and 8 neighbours"
    ):
        sc.nn.prototypes(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), 5)
    with pytest.raises(ValueError, match="keys and values must be finite"):
        sc.nn.prototypes(torch.full((1, 4, 2), math.nan), torch.zeros(1, 4, 2), 2)
    with pytest.raises(ValueError, match=r"got \(1, 4, 2\) and \(1, 3, 2\)"):
        sc.nn.prototypes(torch.zeros(1, 4, 2), torch.zeros(1, 3, 2), 2)
