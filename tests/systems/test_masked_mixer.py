"""S190, Masked Mixer: tokens mixed by a learned triangular matrix of a fixed size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import Block, Stack
from saccade.tasks import text
from saccade.tasks.text import VOCAB, Corpus
from systems.helpers import stepwise, text_loss, train_on_text

pytestmark = pytest.mark.system("S190")


def mixed(length: int, n: int, kv: int = 4) -> tuple[Tensor, Tensor]:
    """Values (2, kv, n, 3) and matrices (4, length, length)."""
    return torch.randn(2, kv, n, 3, dtype=torch.float64), torch.randn(4, length, length, dtype=torch.float64)


@pytest.mark.parametrize(("length", "n"), [(12, 12), (12, 5), (1, 1)])
def test_an_explicit_triangular_product_by_loops_with_gradients(length: int, n: int) -> None:
    v, w = (x.requires_grad_() for x in mixed(length, n))
    found = sc.attend(v, v, v, f"masked_mixer({length})", params={"mixing": w})
    rows = [
        sum(w[h, i, j] * v[b, h, j] for j in range(i + 1))
        for b in range(2)
        for h in range(4)
        for i in range(n)
    ]
    expected = torch.stack(rows).view(2, 4, n, 3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, w[:, :n, :n].tril() @ v, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), (v, w)) for x in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_the_jacobian_is_exactly_zero_for_later_tokens() -> None:
    layer, x = sc.nn.Attention(8, 2, "masked_mixer(10)").double(), torch.randn(1, 9, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, :, 0].abs().amax((1, 3))
    assert torch.equal(jacobian > 0, torch.ones(9, 9, dtype=torch.bool).tril())


def test_neither_queries_nor_keys_are_made() -> None:
    layer = sc.nn.Attention(16, 2, "masked_mixer(10)")
    assert sorted(n for n, _ in layer.named_parameters()) == [
        "mixing",
        "out_proj.weight",
        "value_proj.weight",
    ]
    assert layer.mixing.shape == (2, 10, 10)


def test_decoding_keeps_values_alone_and_equals_the_whole() -> None:
    layer = sc.nn.Attention(16, 2, "masked_mixer(30)").double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    found, held = stepwise(layer, x)
    torch.testing.assert_close(found, layer(x), atol=1e-12, rtol=0)
    assert held == [2 * 16 * 8 * n for n in range(1, 31)]


def test_text_beyond_the_context_is_refused() -> None:
    layer = sc.nn.Attention(16, 2, "masked_mixer(6)")
    with pytest.raises(
        sc.NotSupported, match=r"mixes 6 tokens at most, got 7: .*greater length.*dynamic_conv"
    ):
        layer(torch.randn(1, 7, 16))
    _, state = layer.step(torch.randn(1, 6, 16), layer.init_state(1))
    with pytest.raises(sc.NotSupported, match="mixes 6 tokens at most, got 7"):
        layer.step(torch.randn(1, 1, 16), state)
    with pytest.raises(sc.MechanismError, match="length must be a whole number of at least 1, got 0"):
        sc.mechanism("masked_mixer(0)")


def test_padding_and_empty_samples() -> None:
    v, w = mixed(12, 12)
    poisoned = v.clone()
    poisoned[1, :, 7:] = math.nan
    lengths = torch.tensor([12, 7])
    found = sc.attend(
        poisoned, poisoned, poisoned, "masked_mixer(12)", params={"mixing": w}, key_lengths=lengths
    )
    alone = sc.attend(*(v[1:, :, :7],) * 3, "masked_mixer(12)", params={"mixing": w})
    torch.testing.assert_close(found[1:, :, :7], alone, atol=1e-12, rtol=0)
    empty = sc.attend(v, v, v, "masked_mixer(12)", params={"mixing": w}, key_lengths=torch.tensor([12, 0]))
    assert bool((empty[1] == 0).all())


def test_the_last_queries_of_ragged_samples() -> None:
    v, w = mixed(12, 12, kv=2)
    lengths = torch.tensor([12, 6])
    q = torch.zeros(2, 4, 3, 3, dtype=torch.float64)
    found = sc.attend(q, v, v, "masked_mixer(12)", params={"mixing": w}, key_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        expected = (w[:, :n, :n].tril() @ v[b, :, :n].repeat_interleave(2, 0))[:, n - 3 :]
        torch.testing.assert_close(found[b], expected, atol=1e-12, rtol=0)


def bigram_bound(corpus: Corpus, length: int) -> float:
    """Nats a held-out byte of a model that knows how often each byte follows each in training."""
    counts = torch.full((VOCAB, VOCAB), 0.01, dtype=torch.float64)
    for block in corpus.train:
        pairs = block[:-1].long() * VOCAB + block[1:].long()
        counts += torch.bincount(pairs, minlength=VOCAB**2).view(VOCAB, VOCAB)
    log = (counts / counts.sum(1, keepdim=True)).log()
    rows = corpus.windows(length)
    return float(-log[rows[:, :-1], rows[:, 1:]].mean())


LENGTH = 48


def language_model(kind: str, dim: int = 48) -> nn.Module:
    """Two blocks of one size: of the mixer, of attention, or one of each. Two heads of 48 x 48 are as many numbers as q and k."""
    torch.manual_seed(0)
    mechanisms = {"mixer": (f"masked_mixer({LENGTH})",) * 2, "attention": ("causal",) * 2}
    mechanisms["hybrid"] = (mechanisms["attention"][0], mechanisms["mixer"][0])
    model = sc.nn.Transformer(VOCAB, dim, 2, heads=2, max_length=LENGTH)
    model.blocks = Stack(Block(dim, 2, sc.mechanism(m)) for m in mechanisms[kind])
    nn.init.normal_(model.embedding.tokens.weight, std=0.1)
    return model


def text_losses(steps: int, *kinds: str) -> tuple[float, dict[str, float]]:
    """The bigram bound, and held-out losses of models of equal size."""
    corpus, losses, sizes = text.load(window=LENGTH), {}, set()
    for kind in kinds:
        model = language_model(kind)
        train_on_text(model, corpus, steps, LENGTH, rate=1e-2)
        losses[kind] = text_loss(model, corpus, LENGTH)
        sizes.add(sum(p.numel() for p in model.parameters()))
    assert len(sizes) == 1
    return bigram_bound(corpus, LENGTH), losses


def test_a_language_model_is_better_than_the_bigram_bound() -> None:
    bound, losses = text_losses(250, "mixer")
    assert losses["mixer"] <= 0.9 * bound


@pytest.mark.slow
def test_mixer_attention_and_hybrid_of_equal_size() -> None:
    """In so short a training the mixer is the best of the three, and the hybrid stands between."""
    bound, losses = text_losses(1000, "mixer", "attention", "hybrid")
    assert max(losses.values()) <= 0.9 * bound
    assert losses["mixer"] < losses["hybrid"] < losses["attention"]
