"""S133, BAM: a learned prior over distances between ALiBi and no positions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.parts.logits import alibi_slopes
from saccade.tasks.passkey import Passkey
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import FRESH, dense, qkv, stepwise, train

HEADS = 4
pytestmark = pytest.mark.system("S133")


def prior(shape: float, scale: list[float] | float = 0.0, location: float | None = None) -> dict[str, Tensor]:
    """params with the same shape and location in every head."""
    found = {
        "prior_shape": torch.full((HEADS,), shape, dtype=torch.float64),
        "prior_scale": torch.tensor(scale, dtype=torch.float64).expand(HEADS).clone(),
    }
    return (
        found
        if location is None
        else found | {"prior_location": torch.full_like(found["prior_shape"], location)}
    )


@pytest.mark.parametrize("location", [None, 0.4, -1.1])
@pytest.mark.parametrize("text", ["bam", "causal + bam"])
def test_the_prior_by_loops(location: float | None, text: str) -> None:
    q, k, v = qkv(1, HEADS, 5, 6, kv=2, keys=8)
    params = prior(0.0, 0.0, location)
    for x in params.values():
        x += torch.randn(HEADS, dtype=torch.float64)
    found = sc.attend(
        q, k, v, text.replace("bam", f"bam({str(location is not None).lower()})"), params=params
    )
    for h in range(HEADS):
        b, a = float(params["prior_shape"][h]), float(params["prior_scale"][h])
        m = 0.0
        if location is not None:
            m = math.exp(params["prior_location"][h]) - math.exp(-params["prior_location"][h])
        for i in range(5):
            keys = range(i + 4) if "causal" in text else range(8)
            e = []
            for j in keys:
                log_prior = -math.exp(a) * (abs(j - (i + 3) - m) + 1e-5) ** b
                e.append(math.exp(float(q[0, h, i] @ k[0, h // 2, j]) / math.sqrt(6) + log_prior))
            expected = sum(x / sum(e) * v[0, h // 2, j] for x, j in zip(e, keys, strict=True))
            torch.testing.assert_close(found[0, h, i], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("text", ["bam", "causal + bam(location=true)"])
def test_a_shape_of_one_with_the_slopes_of_alibi_is_alibi(text: str) -> None:
    q, k, v = qkv(2, HEADS, 33, 8, kv=2)
    params = prior(1.0, [math.log(s) for s in alibi_slopes(HEADS)], 0.0 if "location" in text else None)
    alibi = "causal + alibi" if "causal" in text else "alibi"
    torch.testing.assert_close(
        sc.attend(q, k, v, text, params=params), sc.attend(q, k, v, alibi), atol=1e-12, rtol=0
    )


def test_a_shape_of_zero_is_no_position() -> None:
    q, k, v = qkv(2, HEADS, 33, 8, kv=2)
    torch.testing.assert_close(
        sc.attend(q, k, v, "bam", params=prior(0.0, 1.3)), dense(q, k, v), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(("shape", "nearer"), [(-0.5, False), (-2.0, False), (0.5, True), (2.0, True)])
def test_a_negative_shape_disfavours_near_keys(shape: float, nearer: bool) -> None:
    q = torch.zeros(1, HEADS, 1, 8, dtype=torch.float64)
    k = v = torch.zeros(1, HEADS, 12, 8, dtype=torch.float64)
    w = sc.attend(q, k, v, "bam", params=prior(shape, -1.0), need=("weights",)).weights[0, :, 0]
    assert bool((w.diff(dim=-1)[:, :-1] > 0).all()) == nearer
    assert bool((w.diff(dim=-1) < 0).all()) == (not nearer)


def test_decoding_equals_the_whole_call_and_all_is_learned() -> None:
    layer = sc.nn.Attention(16, 2, "causal + bam(location=true)").double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)
    layer(x).sin().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in layer.parameters())


def passed(mechanism: str, steps: int = 150, seed: int = FRESH) -> list[float]:
    """Accuracy at the trained length and at 8 times it, of one layer that finds a one-digit key."""
    torch.manual_seed(seed)
    task, generator = Passkey(64, digits=1), torch.Generator().manual_seed(seed)
    model = sc.nn.Transformer(task.vocab, dim=32, depth=1, heads=4, mechanism=mechanism, positions="none")
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    found = []
    for length in (64, 512):
        tokens, targets = Passkey(length, digits=1).batch(128, torch.Generator().manual_seed(seed + 1))
        with torch.no_grad():
            found.append(accuracy(model(tokens), targets))
    return found


def test_it_finds_a_passkey_at_eight_times_the_trained_length() -> None:
    short, long = passed("causal + bam")
    assert short >= 0.99
    assert long >= 0.95
    assert long >= passed("causal + alibi")[1] - 0.02
