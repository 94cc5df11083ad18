"""S125, NoPE with a temperature a head: tuned alone, it carries a model without positions to longer texts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.tasks.passkey import Passkey
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import FRESH, below, dense, qkv, stepwise, train

pytestmark = pytest.mark.system("S125")


def small_model() -> sc.nn.Transformer:
    model = sc.nn.Transformer(22, dim=16, depth=2, heads=2, mechanism="nope_head_scale", positions="none")
    return model.double()


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)


def test_the_logits_are_multiplied_by_the_temperature() -> None:
    q, k, v = qkv(2, 4, 17, 8, kv=2)
    scale = torch.tensor([0.5, 1.0, 1.7, 3.0], dtype=torch.float64)
    found = sc.attend(q, k, v, "nope_head_scale", params={"head_scale": scale.log()})
    expected = dense(scale[:, None, None] * q, k, v, below(17))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_temperature_of_one_is_the_frozen_model_exactly() -> None:
    model = small_model()
    plain = sc.nn.Transformer(22, dim=16, depth=2, heads=2, positions="none").double()
    plain.load_state_dict({n: x for n, x in model.state_dict().items() if "head_scale" not in n})
    tokens = torch.randint(22, (2, 30))
    assert torch.equal(model(tokens), plain(tokens))


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(16, 2, "nope_head_scale").double()
    nn.init.normal_(layer.head_scale)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)


def test_tuning_moves_only_the_temperatures() -> None:
    model, task, generator = small_model(), Passkey(32, 2), torch.Generator().manual_seed(0)
    model.norm.weight.requires_grad_(False)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    asked = [p.requires_grad for p in model.parameters()]
    losses = sc.nn.tune_head_scales(model, (task.batch(4, generator) for _ in range(3)), loss_of)
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert changed == {f"blocks.{n}.attention.head_scale" for n in range(2)}
    assert sum(x.numel() for x in sc.nn.head_scales(model)) == 2 * 2
    assert len(losses) == 3
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())


def test_one_temperature_for_all_is_the_candidate_of_the_least_loss() -> None:
    model, generator = small_model(), torch.Generator().manual_seed(0)
    tokens, targets = Passkey(32, 2).batch(8, generator)
    losses = {}
    for scale in (0.5, 1.0, 2.0, 4.0):
        for p in sc.nn.head_scales(model):
            nn.init.constant_(p, math.log(scale))
        losses[scale] = float(loss_of(model, tokens, targets).detach())
    best = sc.nn.choose_head_scale(model, tokens, targets, loss_of, list(losses))
    assert best == min(losses, key=losses.__getitem__)
    assert all(torch.allclose(p.exp(), torch.full_like(p, best)) for p in sc.nn.head_scales(model))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no head_scale: build it with a mechanism such as nope_head_scale"):
        sc.nn.head_scales(sc.nn.Transformer(8, dim=8, depth=1, heads=1))
    with pytest.raises(ValueError, match="temperatures above 0"):
        sc.nn.choose_head_scale(small_model(), torch.zeros(1, 1), torch.zeros(1, 1), loss_of, [1.0, 0.0])


@torch.no_grad()
def mean_entropy(model: sc.nn.Transformer, tokens: Tensor) -> float:
    """Mean entropy of the attention rows of all layers and heads, in nats."""
    x, found = model.embedding(tokens), []
    for block in model.blocks:
        w = block.attention(block.norm1(x), need=("weights",)).weights
        found.append(-torch.xlogy(w, w).sum(-1).mean())
        x = block(x)
    return float(torch.stack(found).mean())


def tuned(seed: int) -> tuple[list[float], list[float]]:
    """Accuracy and entropy at four times the trained length, before and after the temperatures were tuned there."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    task, far = Passkey(16, digits=3), Passkey(64, digits=3)
    model = sc.nn.Transformer(task.vocab, dim=32, depth=2, mechanism="nope_head_scale", positions="none")
    nn.init.normal_(model.embedding.tokens.weight, std=0.2)
    frozen = [p for n, p in model.named_parameters() if not n.endswith("head_scale")]
    train(frozen, lambda step: loss_of(model, *task.batch(32, generator)), 400, rate=5e-3)
    tokens, targets = far.batch(128, torch.Generator().manual_seed(seed + 1))
    found: tuple[list[float], list[float]] = [], []
    for batches in (0, 30):
        if batches:
            sc.nn.tune_head_scales(model, (far.batch(32, generator) for _ in range(batches)), loss_of)
        with torch.no_grad():
            found[0].append(accuracy(model(tokens), targets))
        found[1].append(mean_entropy(model, tokens))
    return found


def test_tuned_temperatures_find_keys_at_four_times_the_trained_length() -> None:
    (before, after), entropies = tuned(FRESH + 1)
    assert after >= before + 0.1, (before, after)
    assert entropies[1] < entropies[0]
