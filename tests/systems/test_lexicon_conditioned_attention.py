"""S168, attention conditioned on a lexicon: what it knows of words that training never showed."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.lexicon import MODES
from systems.helpers import train

DIM, LEX, N = 6, 3, 5
pytestmark = pytest.mark.system("S168")
each_mode = pytest.mark.parametrize("mode", MODES)


def tensors() -> tuple[Tensor, Tensor]:
    return torch.randn(2, N, DIM, dtype=torch.float64), torch.randn(2, N, LEX, dtype=torch.float64)


def formula(layer: sc.nn.LexiconAttention, h: Tensor, c: Tensor) -> Tensor:
    """Word by word."""
    rows = []
    for b in range(h.shape[0]):
        scores = []
        for i in range(h.shape[1]):
            state, known = h[b, i], c[b, i]
            if layer.mode == "plain":
                f = state
            else:
                w, bias = layer.condition.weight, layer.condition.bias
                if layer.mode == "concat":
                    f = torch.tanh(w[:, :DIM] @ state + w[:, DIM:] @ known + bias)
                elif layer.mode == "gate":
                    f = state / (1 + torch.exp(-(w @ known + bias)))
                else:
                    f = (w[:DIM] @ known + bias[:DIM]) * state + w[DIM:] @ known + bias[DIM:]
            scores.append(sum(layer.query[m] * f[m] for m in range(DIM)))
        a = torch.softmax(torch.stack(scores), 0)
        rows.append(sum(a[i] * h[b, i] for i in range(h.shape[1])))
    return torch.stack(rows)


@each_mode
def test_equals_the_formula_with_gradients(mode: str) -> None:
    layer = sc.nn.LexiconAttention(DIM, LEX, mode).double()
    h, c = (x.requires_grad_() for x in tensors())
    leaves = [h, *layer.parameters()] + ([] if mode == "plain" else [c])
    found, want = layer(h, c), formula(layer, h, c)
    torch.testing.assert_close(found, want)
    weight = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["gate", "affine"])
def test_a_condition_that_says_nothing_is_plain_attention(mode: str) -> None:
    plain, layer = (sc.nn.LexiconAttention(DIM, LEX, m).double() for m in ("plain", mode))
    with torch.no_grad():
        layer.query.copy_(plain.query)
        layer.condition.weight.zero_()
        layer.condition.bias.fill_(50.0)
        if mode == "affine":
            layer.condition.bias.copy_(torch.tensor([1.0, 0.0]).repeat_interleave(DIM))
    h, c = tensors()
    torch.testing.assert_close(layer(h, c), plain(h, c), atol=1e-12, rtol=0)


@each_mode
def test_padding_has_no_weight(mode: str) -> None:
    layer = sc.nn.LexiconAttention(DIM, LEX, mode).double()
    h, c = tensors()
    h[1, 3:] = c[1, 3:] = math.nan
    found = layer(h, c, torch.tensor([N, 3]), need=("out", "weights"))
    torch.testing.assert_close(found.out[1:], layer(h[1:, :3], c[1:, :3]))
    assert not found.weights[1, 0, 0, 3:].any()
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 1, 1, dtype=torch.float64))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be one of plain, concat, gate, affine, got 'film'"):
        sc.nn.LexiconAttention(DIM, LEX, "film")


POLAR, KNOWN, WORDS, LENGTH = 20, 100, 200, 12


def sentences(count: int, unseen: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words and the polarity of the one that has any. The other words are neutral, at test such as training never showed.

    Words below 20 are polar, even ones good and odd ones bad; the next 80 are neutral, and 100 more that only tests use.
    """
    low, high = (KNOWN, WORDS) if unseen else (POLAR, KNOWN)
    words = torch.randint(low, high, (count, LENGTH), generator=generator)
    polar = torch.randint(POLAR, (count,), generator=generator)
    words[torch.arange(count), torch.randint(LENGTH, (count,), generator=generator)] = polar
    return words, polar % 2


class Sentiment(nn.Module):
    """Words through a two-way recurrent network, weighted by their states and a lexicon, to a polarity."""

    def __init__(self, mode: str, lexicon: Tensor, word_dim: int = 4, dim: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, word_dim)
        self.rnn = nn.GRU(word_dim, dim // 2, batch_first=True, bidirectional=True)
        self.attention = sc.nn.LexiconAttention(dim, lexicon.shape[1], mode)
        self.polarity = nn.Linear(dim, 2)
        self.register_buffer("lexicon", lexicon)

    def forward(self, words: Tensor) -> Tensor:
        """Words (B, n) to logits (B, 2)."""
        states, _ = self.rnn(self.words(words))
        return self.polarity(self.attention(states, self.lexicon[words]))


@cache
def trained(mode: str, seed: int, shuffled: bool = False, steps: int = 400) -> Sentiment:
    """A classifier whose lexicon knows which words are polar, or is shuffled over all words."""
    torch.manual_seed(seed)
    polar = (torch.arange(WORDS) < POLAR).float()
    polar = polar[torch.randperm(WORDS)] if shuffled else polar
    model = Sentiment(mode, torch.stack((polar, 1 - polar), 1))
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        words, polarity = sentences(32, False, generator)
        return F.cross_entropy(model(words), polarity)

    train(model.parameters(), loss, steps, 1e-2)
    return model


@torch.no_grad()
def accuracy(model: Sentiment) -> float:
    """Accuracy among neutral words that training never showed."""
    words, polarity = sentences(1000, True, torch.Generator().manual_seed(99))
    return float((model(words).argmax(-1) == polarity).float().mean())


def test_a_lexicon_finds_what_matters_among_unseen_words() -> None:
    plain, gated = accuracy(trained("plain", 0)), trained("gate", 0)
    assert accuracy(gated) >= plain + 0.1
    known = gated.lexicon.clone()
    gated.lexicon.copy_(known[torch.randperm(WORDS, generator=torch.Generator().manual_seed(0))])
    wrong = accuracy(gated)
    gated.lexicon.copy_(known)
    assert wrong <= plain, (wrong, plain)


@pytest.mark.slow
def test_the_gain_comes_from_what_the_lexicon_knows() -> None:
    """Means of three runs: every condition gains; trained with a shuffled lexicon, most of the gain is gone."""

    def mean(mode: str, shuffled: bool = False) -> float:
        return sum(accuracy(trained(mode, seed, shuffled)) for seed in range(3)) / 3

    plain, gated = mean("plain"), mean("gate")
    assert gated >= plain + 0.1, (plain, gated)
    assert mean("concat") >= plain + 0.1
    assert mean("affine") >= plain + 0.05
    assert mean("gate", shuffled=True) <= gated - 0.04
