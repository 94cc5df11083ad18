"""S176, linear log-normal attention: exponential features with the spread of softmax."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.systems.lln import ExpFeature, matching, softmax_spread, spread
from systems.helpers import dense, flops, qkv, stepwise, train

pytestmark = pytest.mark.system("S176")


def rates(kv: int) -> dict[str, Tensor]:
    return {"rates": 0.5 + torch.rand(kv, 2, dtype=torch.float64)}


def written_out(q: Tensor, k: Tensor, v: Tensor, buffers: dict[str, Tensor], causal: bool) -> Tensor:
    """Row by row, pair by pair, channel by channel."""
    b, h, length, d = q.shape
    rows = []
    for n in range(b):
        for head in range(h):
            g = head * k.shape[1] // h
            alpha, beta = buffers["rates"][g]
            for i in range(length):
                keys = range(i + 1 if causal else length)
                w = [
                    sum(torch.exp(alpha * q[n, head, i, c] + beta * k[n, g, j, c]) for c in range(d))
                    for j in keys
                ]
                rows.append(sum(x * v[n, g, j] for j, x in zip(keys, w, strict=True)) / sum(w))
    return torch.stack(rows).view(b, h, length, -1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv", [1, 2])
def test_factors_equal_the_products_and_their_gradients(kv: int, causal: bool) -> None:
    x = [t.requires_grad_() for t in qkv(2, 2, 11, 4, kv=kv)]
    w = rates(kv)
    expected = written_out(*x, w, causal)
    grads = torch.autograd.grad(expected.sin().sum(), x)
    text = f"{'causal + ' if causal else ''}lln_attention"
    for kernel in ("recurrent", "reference"):
        found = sc.attend(*x, text, buffers=w, kernel=kernel)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        for got, wanted in zip(torch.autograd.grad(found.sin().sum(), x), grads, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_with_blocks_it_is_the_mean_of_both(causal: bool) -> None:
    q, k, v = qkv(1, 2, 22, 4)
    w = rates(2)
    i = torch.arange(22)
    exist = (i[:, None] // 8 == i // 8) & (~torch.tensor(causal) | (i[:, None] >= i))
    limit = "true" if causal else "false"
    found = sc.attend(q, k, v, f"lln_attention(8, causal={limit})", buffers=w)
    expected = (written_out(q, k, v, w, causal) + dense(q, k, v, exist)) / 2
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("block", ["none", "4"])
def test_steps_equal_the_whole(block: str) -> None:
    layer = sc.nn.Attention(16, 2, f"lln_attention({block}, causal=true)").double()
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_large_and_padded_inputs_stay_finite(causal: bool) -> None:
    text = f"lln_attention(none, causal={'true' if causal else 'false'})"
    q, k, v = (200 * x for x in qkv(2, 2, 30, 4, dtype=torch.float32))
    w = {"rates": torch.ones(2, 2)}
    assert bool(torch.isfinite(sc.attend(q, k, v, text, buffers=w)).all())
    lengths = torch.tensor([30, 12])
    gone = (torch.arange(30) >= lengths[:, None])[:, None, :, None]
    found = sc.attend(
        q, k.masked_fill(gone, math.nan), v.masked_fill(gone, math.nan), text, buffers=w, key_lengths=lengths
    )
    alone = sc.attend(q[1:, :, :12], k[1:, :, :12], v[1:, :, :12], text, buffers=w)
    torch.testing.assert_close(found[1:, :, :12], alone)


def test_bfloat16_and_shared_heads() -> None:
    q, k, v = qkv(2, 4, 60, 8, kv=2, dtype=torch.bfloat16)
    w = {"rates": torch.ones(2, 2)}
    found = sc.attend(q, k, v, "causal + lln_attention", buffers=w)
    assert found.dtype == torch.bfloat16
    wanted = sc.attend(
        q.double(), k.double(), v.double(), "causal + lln_attention", buffers={"rates": w["rates"].double()}
    )
    assert (found.double() - wanted).abs().max() < 0.01 * wanted.abs().max()


def spreads(
    std_q: float, std_k: float, text: str = "lln_attention", fitted: bool = True
) -> tuple[float, float]:
    """The variance of log-weights on normal q and k (d = 64, n = 1024), of a mechanism and of softmax."""
    q, k, v = qkv(1, 1, 1024, 64)
    q, k = std_q * q, std_k * k
    m = sc.mechanism(text)
    buffers = m.buffers(sc.parts.base.Sizes(1, 1, 64, 64))
    if fitted and buffers:
        buffers = ExpFeature().refresh(buffers, q, k, None, None)
    logs = []
    for mechanism, own in ((m, buffers), ("full", {})):
        w = sc.attend(q, k, v[..., :1], mechanism, buffers=own, need=("out", "weights")).weights
        assert w is not None
        logs.append(float(w.log().var()))
    return logs[0], logs[1]


@pytest.mark.parametrize(
    ("std_q", "std_k", "within"), [(1.0, 1.0, 0.05), (1.4, 0.7, 0.05), (0.6, 1.1, 0.05), (1.5, 1.2, 0.1)]
)
def test_fitted_rates_give_the_spread_of_softmax(std_q: float, std_k: float, within: float) -> None:
    """The heavier the tail, the more 1,024 tokens differ from the draws of the fit."""
    own, softmax = spreads(std_q, std_k)
    assert abs(own / softmax - 1) <= within


def test_fresh_rates_are_those_of_unit_variances_and_elu_is_far_off() -> None:
    own, softmax = spreads(1.0, 1.0, fitted=False)
    assert abs(own / softmax - 1) <= 0.05
    assert spreads(1.0, 1.0, "linear")[0] < 0.1 * softmax


@pytest.mark.parametrize("d", [4, 16, 64])
def test_the_fit_brackets_its_target(d: int) -> None:
    for variance in (0.05, 1.0, 7.0):
        assert spread(matching(variance, d), d) == pytest.approx(softmax_spread(variance, d), rel=2e-4)
    assert softmax_spread(1.0, d) == pytest.approx(1.0, abs=0.2)
    assert matching(1.0, 64) == pytest.approx(3.14, abs=0.06)


def test_entropy_falls_as_s_grows() -> None:
    q, k, v = qkv(1, 1, 256, 16)
    entropies = []
    for s in (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0):
        w = {"rates": torch.full((1, 2), s / 2**0.5, dtype=torch.float64)}
        p = sc.attend(q, k, v, "lln_attention", buffers=w, need=("out", "weights")).weights
        assert p is not None
        entropies.append(-float((p * p.log()).sum(-1).mean()))
    assert all(a > b for a, b in itertools.pairwise(entropies))
    assert entropies[0] < math.log(256)


def test_a_layer_fits_its_rates_when_told_and_not_before() -> None:
    layer = sc.nn.Attention(32, 2, "gqa(1) + causal + lln_attention")
    x, before = 3 * torch.randn(4, 50, 32), layer.rates.clone()
    layer(x)
    assert torch.equal(layer.rates, before)
    layer.refresh(x, key_lengths=torch.tensor([50, 50, 50, 10]))
    assert not torch.equal(layer.rates, before)
    q, k, _ = layer.project(x)
    valid = torch.ones(4, 50, dtype=torch.bool)
    valid[3, 10:] = False
    std_q = float(q.detach().transpose(1, 2)[valid].double().std())
    std_k = float(k.detach()[:, 0][valid].double().std())
    s = matching(float(f"{(std_q * std_k) ** 2:.4g}"), 16)
    torch.testing.assert_close(layer.rates[0], torch.tensor([s / (2**0.5 * std_q), s / (2**0.5 * std_k)]))


def test_what_is_refused() -> None:
    q, k, v = qkv(1, 2, 5, 4)
    with pytest.raises(sc.NotSupported, match=r"exp_feature needs a buffer `rates`"):
        ExpFeature().map(q, "q", None, {"rates": torch.ones(2, 3)})
    with pytest.raises(sc.NotSupported, match=r"got \(3, 2\) for 2 heads"):
        sc.attend(q, k, v, "lln_attention", buffers={"rates": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="fitted to q and k that vary, got deviations 0 and"):
        ExpFeature().refresh({}, torch.zeros_like(q), k, None, None)
    with pytest.raises(sc.MechanismError, match="exp_feature needs ratio"):
        sc.mechanism("causal + exp_feature")


@pytest.mark.parametrize("text", ["lln_attention", "causal + lln_attention", "lln_attention(64)"])
def test_doubling_the_length_doubles_the_work(text: str) -> None:
    def cost(n: int) -> int:
        q, k, v = (torch.zeros(1, 1, n, 16) for _ in range(3))
        return flops(functools.partial(sc.attend, q, k, v, text, buffers={"rates": torch.ones(1, 2)}))

    assert 1.9 <= cost(4096) / cost(2048) <= 2.1


def test_a_layer_learns_to_copy_a_softmax_layer() -> None:
    teacher, layer = (sc.nn.Attention(32, 2, f"causal + {m}") for m in ("full", "lln_attention"))
    errors = []

    def loss(step: int) -> Tensor:
        x = 2 * torch.randn(16, 32, 32)
        wanted = teacher(x).detach()
        error = (layer(x) - wanted).square().mean() / wanted.var()
        errors.append(float(error.detach()))
        return error

    assert train(layer.parameters(), loss, steps=150) < 0.5 * errors[0]
