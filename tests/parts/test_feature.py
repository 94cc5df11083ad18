"""Feature maps against plain loops, and what random features promise."""

from __future__ import annotations

import math

import pytest
import torch

import saccade as sc
from saccade.parts.base import Sizes
from saccade.parts.feature import (
    CosineFeature,
    Elu1,
    Favor,
    Identity,
    LengthScaled,
    ReluFeature,
    SoftmaxFeature,
    orthogonal_gaussian,
)


def test_identity_and_elu() -> None:
    x = 2 * torch.randn(1, 2, 3, 4, dtype=torch.float64)
    assert Identity().map(x, "q", None, {})[0] is x
    phi, scale = Elu1().map(x, "k", None, {})
    assert scale is None
    for got, value in zip(phi.flatten().tolist(), x.flatten().tolist(), strict=True):
        assert got == pytest.approx(value + 1 if value > 0 else math.exp(value), abs=1e-12)


@pytest.mark.parametrize("text", ["cosformer(12)", "causal + cosformer(12)"])
def test_cosine_weighs_near_keys(text: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 9, 3, dtype=torch.float64)
    found = sc.attend(q, k, v, text)
    for i in range(9):
        w = [
            sum(max(a, 0.0) * max(b, 0.0) for a, b in zip(q[0, 0, i].tolist(), key, strict=True))
            * math.cos(math.pi / 2 * (i - j) / 12)
            for j, key in enumerate(k[0, 0].tolist())
        ]
        w = w[: i + 1] if "causal" in text else w
        total = sum(w)
        want = sum(x * row for x, row in zip(w, v[0, 0], strict=False))
        torch.testing.assert_close(found[0, 0, i], want / total if total else 0 * v[0, 0, 0])


def test_cosine_goes_on_from_a_state_and_ends_at_its_length() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 4, dtype=torch.float64)
    text = "causal + cosformer(20)"
    whole, state, steps = sc.attend(q, k, v, text), sc.init_state(text, 1, 2, 4, dtype=torch.float64), []
    for piece in zip(*(x.split([7, 1, 1, 11], 2) for x in (q, k, v)), strict=True):
        made = sc.attend(*piece, text, state=state, need=("state",))
        assert made.state is not None
        state = made.state
        steps.append(made.out)
    torch.testing.assert_close(torch.cat(steps, 2), whole)
    with pytest.raises(sc.NotSupported, match="at most 20 tokens"):
        sc.attend(q[:, :, :1], k[:, :, :1], v[:, :, :1], text, state=state)
    with pytest.raises(ValueError, match="nodes have no order"):
        sc.nn.LinearVirtualNode(8, heads=2, feature=CosineFeature(4))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_relu_features_and_rows_that_meet_no_key(power: float) -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 3, dtype=torch.float64)
    q[0, 0, 2] = -q[0, 0, 2].abs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = sc.attend(*leaves, f"causal + relu_feature({power}) + ratio")
    for i in range(6):
        w = [
            sum((max(a, 0.0) * max(b, 0.0)) ** power for a, b in zip(q[0, 0, i].tolist(), key, strict=True))
            for key in k[0, 0, : i + 1].tolist()
        ]
        for c in range(3):
            read = sum(x * v[0, 0, j, c].item() for j, x in enumerate(w))
            assert found[0, 0, i, c].item() == pytest.approx(read / sum(w) if sum(w) else 0.0, abs=1e-12)
    assert not found[0, 0, 2].any()
    assert all(bool(torch.isfinite(x).all()) for x in torch.autograd.grad(found.sum(), leaves))
    with pytest.raises(sc.MechanismError, match=r"power must be a number of at least 1, got 0\.5"):
        ReluFeature(0.5)


@pytest.mark.parametrize("heads", [2, 4])
def test_favor(heads: int) -> None:
    d, m = 4, 6
    x = torch.randn(2, heads, 3, d, dtype=torch.float64)
    w = torch.randn(2, m, d, dtype=torch.float64)
    phi, scale = Favor(m).map(x, "q", None, {"favor": w})
    assert scale is not None
    assert float(phi.max()) <= 1
    for b in range(2):
        for h in range(heads):
            for n in range(3):
                y = [c * d**-0.25 for c in x[b, h, n].tolist()]
                for f in range(m):
                    dot = sum(w[h * 2 // heads, f, c].item() * y[c] for c in range(d))
                    want = math.exp(dot - sum(c * c for c in y) / 2) / math.sqrt(m)
                    got = phi[b, h, n, f].item() * math.exp(scale[b, h, n].item())
                    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("rows", ["orthogonal", "independent"])
def test_favor_estimates_the_softmax_kernel_without_bias(rows: str) -> None:
    d, m, draws = 4, 8, 4000
    g = torch.Generator().manual_seed(0)
    q, k = 0.7 * torch.randn(2, 1, 1, 1, d, generator=g, dtype=torch.float64)
    part = Favor(m, rows)
    w = part.buffers(Sizes(draws, draws, d, d), g)["favor"].double()
    (phi_q, scale_q), (phi_k, scale_k) = (
        part.map(x.expand(1, draws, 1, d), "q", None, {"favor": w}) for x in (q, k)
    )
    assert scale_q is not None
    assert scale_k is not None
    estimates = ((phi_q * phi_k).sum(-1) * torch.exp(scale_q + scale_k)).flatten()
    want = math.exp(float((q * k).sum()) / math.sqrt(d))
    spread = float(estimates.std()) / math.sqrt(draws)
    assert abs(float(estimates.mean()) - want) < 5 * spread
    assert spread < 0.05 * want


def test_orthogonal_rows_are_orthogonal_and_as_long_as_gaussian_ones() -> None:
    d = 16
    w = orthogonal_gaussian(40, d, torch.Generator().manual_seed(0)).double()
    assert w.shape == (40, d)
    for lo, hi in ((0, 16), (16, 32), (32, 40)):
        block = torch.nn.functional.normalize(w[lo:hi], dim=-1)
        torch.testing.assert_close(
            block @ block.T, torch.eye(hi - lo, dtype=torch.float64), atol=1e-6, rtol=0
        )
    many = orthogonal_gaussian(4096, d, torch.Generator().manual_seed(1)).double()
    assert float(many.square().sum(-1).mean()) == pytest.approx(d, rel=0.05)
    assert float(many.mean()) == pytest.approx(0, abs=0.02)


def test_drawing_anew_is_explicit_and_repeats_with_its_seed() -> None:
    layer = sc.nn.Attention(16, 2, "performer_favor(8)", generator=torch.Generator().manual_seed(1))
    again = sc.nn.Attention(16, 2, "performer_favor(8)", generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer.favor, again.favor)
    before = layer.favor.clone()
    x = torch.randn(1, 5, 16)
    layer(x)
    assert torch.equal(layer.favor, before)
    layer.refresh(x, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(layer.favor, before)


@pytest.mark.parametrize("valid", [None, torch.tensor([[True] * 3 + [False], [True] * 4])])
def test_softmax_feature_by_loops(valid: torch.Tensor | None) -> None:
    q, k, v = torch.randn(3, 2, 1, 4, 3, dtype=torch.float64)
    lengths = None if valid is None else valid.sum(-1)
    got = sc.reference.attend(q, k, v, "efficient_attention", key_lengths=lengths)
    for b in range(2):
        n = 4 if lengths is None else int(lengths[b])
        for i in range(4):
            eq = [math.exp(x) for x in q[b, 0, i].tolist()]
            for e in range(3):
                want = 0.0
                for c in range(3):
                    ek = [math.exp(k[b, 0, j, c].item()) for j in range(n)]
                    read = sum(ek[j] / sum(ek) * v[b, 0, j, e].item() for j in range(n))
                    want += eq[c] / sum(eq) * read
                assert got[b, 0, i, e].item() == pytest.approx(want, abs=1e-12)


def test_rows_of_efficient_attention_sum_to_one() -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 4, dtype=torch.float64)
    w = sc.attend(q, k, v, "efficient_attention", need=("weights",)).weights
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))


def test_length_scaled_is_the_mean_of_products() -> None:
    q, k, v = torch.randn(3, 2, 1, 5, 3, dtype=torch.float64)
    got = sc.reference.attend(q, k, v, "efficient_attention(normalizer=scaling)")
    torch.testing.assert_close(got, (q @ k.transpose(-1, -2) / 5) @ v)
    ragged = sc.reference.attend(
        q, k, v, "efficient_attention(normalizer=scaling)", key_lengths=torch.tensor([2, 5])
    )
    torch.testing.assert_close(ragged[0], (q[0] @ k[0, :, :2].transpose(-1, -2) / 2) @ v[0, :, :2])


def test_features_that_look_at_the_whole_sequence_have_no_causal_form() -> None:
    for part in (SoftmaxFeature(), LengthScaled()):
        assert part.causal == "never"
        with pytest.raises(sc.NotSupported, match="no causal form; its causal relative"):
            sc.mechanism(f"causal + {part}")
