"""S223, ConvBERT: attention beside a convolution whose kernels the span around a token decides."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import FeedForward
from saccade.tasks.recall import SILENT
from systems.helpers import dense, train

pytestmark = pytest.mark.system("S223")


def block(width: int = 5, span: int | None = 3) -> sc.nn.SpanConvAttention:
    return sc.nn.SpanConvAttention(8, heads=4, width=width, span=span).double()


def kernel_by_loops(layer: sc.nn.SpanConvAttention, x: Tensor, i: int, head: int) -> Tensor:
    """The kernel of token i of x (n, dim), as the paper writes it."""
    near = layer.span_conv.weight[:, 0]
    reach = near.shape[1] // 2
    span = torch.zeros_like(x[0])
    for t in range(near.shape[1]):
        if 0 <= i + t - reach < len(x):
            span = span + near[:, t] * x[i + t - reach]
    logits = layer.tap_proj(layer.query_proj(x[i]) * layer.span_proj(span)).view(layer.heads, -1)[head]
    return logits.exp() / logits.exp().sum()


def convolution_by_loops(layer: sc.nn.SpanConvAttention, x: Tensor) -> Tensor:
    """(heads, n, size) of x (n, dim)."""
    values = layer.conv_value_proj(x).view(len(x), layer.heads, -1)
    heads = []
    for head in range(layer.heads):
        rows = []
        for i in range(len(x)):
            kernel = kernel_by_loops(layer, x, i, head)
            inside = [t for t in range(len(kernel)) if 0 <= i + t - len(kernel) // 2 < len(x)]
            rows.append(sum(kernel[t] * values[i + t - len(kernel) // 2, head] for t in inside))
        heads.append(torch.stack(rows))
    return torch.stack(heads)


@pytest.mark.parametrize(("width", "span"), [(5, 3), (3, 5), (5, None)])
def test_the_convolution_by_loops_with_gradients(width: int, span: int | None) -> None:
    layer, x = block(width, span), torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    found, expected = layer.convolve(x[None])[0], convolution_by_loops(layer, x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    leaves = [x, layer.span_conv.weight, layer.query_proj.weight, layer.tap_proj.weight]
    grads = [torch.autograd.grad(y.sin().sum(), leaves) for y in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_kernels_sum_to_one() -> None:
    layer, x = block(), torch.randn(9, 8, dtype=torch.float64)
    nn.init.zeros_(layer.conv_value_proj.weight)
    nn.init.ones_(layer.conv_value_proj.bias)
    inside = layer.convolve(x[None])[0, :, 2:-2]
    torch.testing.assert_close(inside, torch.ones_like(inside), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("width", "span"), [(7, 3), (3, 7), (5, 5)])
def test_the_receptive_field_is_that_of_kernel_and_span(width: int, span: int) -> None:
    """Values are read over the kernel's width and the kernel looks at the span: the wider of the two, and nothing beyond."""
    layer, x = block(width, span), torch.randn(1, 15, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer.convolve(x)[0, :, 7], x)
    reads = jacobian.abs().amax((0, 1, 2, 4)) > 0
    away = (torch.arange(15) - 7).abs()
    assert torch.equal(reads, away <= max(width, span) // 2)
    taps = (
        torch.autograd.functional.jacobian(lambda x: layer.taps(x)[0, :, 7], x).abs().amax((0, 1, 2, 4)) > 0
    )
    assert torch.equal(taps, away <= span // 2)


def test_both_halves_share_their_queries_and_stand_side_by_side() -> None:
    layer, x = block(), torch.randn(2, 9, 8, dtype=torch.float64)
    q, k, v = (
        p(x).view(2, 9, 2, 2).transpose(1, 2) for p in (layer.query_proj, layer.key_proj, layer.value_proj)
    )
    halves = torch.cat((dense(q, k, v), torch.stack([convolution_by_loops(layer, y) for y in x])), 1)
    expected = layer.out_proj(halves.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_padding_reaches_neither_half() -> None:
    layer, x = block(), torch.randn(2, 12, 8, dtype=torch.float64)
    poisoned = x.clone()
    poisoned[1, 7:] = math.nan
    found = layer(poisoned, key_lengths=torch.tensor([12, 7]))
    torch.testing.assert_close(found[1:, :7], layer(x[1:, :7]), atol=1e-12, rtol=0)
    torch.testing.assert_close(found[:1], layer(x[:1]), atol=1e-12, rtol=0)


def test_bad_sizes_are_refused() -> None:
    for options in ({"heads": 3}, {"heads": 4, "ratio": 3}, {"heads": 4, "ratio": 0}):
        with pytest.raises(ValueError, match=r"must be a multiple of heads=.*of ratio="):
            sc.nn.SpanConvAttention(8, **options)
    with pytest.raises(ValueError, match="span must be an odd number of tokens of at least 1, got 4"):
        sc.nn.SpanConvAttention(8, 4, span=4)
    with pytest.raises(sc.MechanismError, match="odd number, got width 4"):
        sc.nn.SpanConvAttention(8, 4, width=4, span=3)


SYMBOLS, LENGTH = 12, 32


class Filler(nn.Module):
    """Strings with hidden tokens to logits, by two blocks of a layer."""

    def __init__(self, layer: Callable[[], nn.Module], dim: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(SYMBOLS + 1, dim), nn.Embedding(LENGTH, dim)
        nn.init.normal_(self.tokens.weight, std=0.2)
        nn.init.normal_(self.places.weight, std=0.2)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))
        self.mixers = nn.ModuleList(layer() for _ in range(depth))
        self.feed_forward = nn.ModuleList(FeedForward(dim) for _ in range(depth))
        self.out = nn.Linear(dim, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        for n, (mixer, feed_forward) in enumerate(zip(self.mixers, self.feed_forward, strict=True)):
            x = x + mixer(self.norms[2 * n](x))
            x = x + feed_forward(self.norms[2 * n + 1](x))
        return self.out(x)


def strings(count: int, generator: torch.Generator) -> Tensor:
    """Strings of a grammar in which the two tokens before decide the odds of the next."""
    odds = torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(100))
    odds = torch.softmax(4 * odds, -1)
    found = torch.randint(SYMBOLS, (count, LENGTH), generator=generator)
    for i in range(2, LENGTH):
        at = odds[found[:, i - 2], found[:, i - 1]]
        found[:, i] = torch.multinomial(at, 1, generator=generator)[:, 0]
    return found


def filled(layer: Callable[[], nn.Module], seed: int, steps: int) -> tuple[float, int]:
    """Loss on hidden tokens of new strings, and the parameters of the mixing layers."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    corpus, model = strings(4096, generator), Filler(layer)

    def loss_on(rows: Tensor, generator: torch.Generator) -> Tensor:
        hidden = torch.rand(rows.shape, generator=generator) < 0.15
        logits = model(rows.masked_fill(hidden, SYMBOLS))
        targets = torch.where(hidden, rows, SILENT)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    def loss(step: int) -> Tensor:
        return loss_on(corpus[torch.randint(len(corpus), (32,), generator=generator)], generator)

    train(model.parameters(), loss, steps, rate=5e-3)
    fresh = torch.Generator().manual_seed(1000)
    with torch.no_grad():
        return float(loss_on(strings(1024, fresh), fresh)), sum(p.numel() for p in model.mixers.parameters())


def attention() -> nn.Module:
    return sc.nn.Attention(32, 4, bias=True)


def mixed() -> nn.Module:
    return sc.nn.SpanConvAttention(32, 4, width=5)


def test_hidden_tokens_of_a_trigram_grammar_with_fewer_parameters() -> None:
    (loss, size), (plain, plain_size) = (filled(layer, seed=0, steps=80) for layer in (mixed, attention))
    assert size < plain_size
    assert loss <= 1.02 * plain


@pytest.mark.slow
def test_three_seeds_of_the_trigram_grammar() -> None:
    loss, plain = (
        sum(filled(layer, seed, steps=300)[0] for seed in range(3)) / 3 for layer in (mixed, attention)
    )
    assert loss <= 1.02 * plain
