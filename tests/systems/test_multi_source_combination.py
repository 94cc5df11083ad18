"""S120, multi-source combination: serial, parallel, flat and hierarchical cross-attention to several encoders."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.multi_source import MODES
from systems.helpers import train

pytestmark = pytest.mark.system("S120")

each_mode = pytest.mark.parametrize("mode", MODES)


def layer_of(mode: str, sources: int = 2) -> sc.nn.MultiSourceAttention:
    return sc.nn.MultiSourceAttention(8, heads=2, sources=sources, mode=mode).double()


def inputs() -> tuple[Tensor, list[Tensor]]:
    x, a, b = (torch.randn(3, n, 8, dtype=torch.float64) for n in (4, 6, 5))
    return x, [a, b]


def read(reader: nn.Module, q: Tensor, context: Tensor) -> Tensor:
    """Attention of one row q (dim) over a context (S, dim), head by head."""
    heads = []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        key, value = reader.key_proj(context)[:, own], reader.value_proj(context)[:, own]
        w = torch.softmax(key @ reader.query_proj(q)[own] / 2, 0)
        heads.append((w[:, None] * value).sum(0))
    return reader.out_proj(torch.cat(heads))


def written_out(layer: sc.nn.MultiSourceAttention, x: Tensor, contexts: list[Tensor]) -> Tensor:
    """Row by row, as the paper writes each strategy."""
    out = []
    for b in range(len(x)):
        for row in x[b]:
            own = [c[b] for c in contexts]
            if layer.mode == "serial":
                for norm, reader, c in zip(layer.norms, layer.readers, own, strict=True):
                    row = row + read(reader, norm(row), c)
                out.append(row)
                continue
            q = layer.norms[0](row)
            if layer.mode == "flat":
                out.append(row + read(layer.readers[0], q, torch.cat(own)))
                continue
            found = torch.stack([read(r, q, c) for r, c in zip(layer.readers, own, strict=True)])
            out.append(row + (found.sum(0) if layer.mode == "parallel" else read(layer.upper, q, found)))
    return torch.stack(out).view_as(x)


@each_mode
def test_each_strategy_row_by_row_with_gradients(mode: str) -> None:
    layer, (x, contexts) = layer_of(mode), inputs()
    leaves = [y.requires_grad_() for y in (x, *contexts)] + list(layer.parameters())
    found, expected = layer(x, contexts), written_out(layer, x, contexts)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(y.sin().sum(), leaves) for y in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


@each_mode
def test_one_source_is_plain_cross_attention(mode: str) -> None:
    layer, (x, contexts) = layer_of(mode, sources=1), inputs()
    if layer.upper is not None:
        nn.init.eye_(layer.upper.value_proj.weight)
        nn.init.eye_(layer.upper.out_proj.weight)
    expected = x + layer.readers[0](layer.norms[0](x), contexts[0])
    torch.testing.assert_close(layer(x, contexts[:1]), expected, atol=1e-12, rtol=0)


def test_flat_is_attention_on_the_concatenation() -> None:
    layer, (x, contexts) = layer_of("flat"), inputs()
    expected = x + layer.readers[0](layer.norms[0](x), torch.cat(contexts, 1))
    torch.testing.assert_close(layer(x, contexts), expected, atol=1e-12, rtol=0)


@each_mode
def test_padding_of_each_source_is_not_read(mode: str) -> None:
    layer, (x, contexts) = layer_of(mode), inputs()
    lengths = [torch.tensor([6, 2, 4]), torch.tensor([1, 5, 3])]
    poisoned = [c.clone() for c in contexts]
    for c, sizes in zip(poisoned, lengths, strict=True):
        for b, n in enumerate(sizes.tolist()):
            c[b, n:] = math.nan
    found = layer(x, poisoned, key_lengths=lengths)
    for b in range(3):
        alone = [c[b : b + 1, : n[b]] for c, n in zip(contexts, lengths, strict=True)]
        torch.testing.assert_close(found[b : b + 1], layer(x[b : b + 1], alone), atol=1e-12, rtol=0)


@each_mode
def test_a_missing_source_leaves_the_others_exact(mode: str) -> None:
    layer, (x, contexts) = layer_of(mode), inputs()
    present = torch.tensor([[True, True], [False, True], [False, False]])
    found = layer(x, contexts, present=present)
    torch.testing.assert_close(found[:1], layer(x, contexts)[:1], atol=1e-12, rtol=0)
    rest = layer_of(mode, sources=1)
    rest.norms, rest.upper = layer.norms[-1:], layer.upper
    rest.readers = layer.readers[-1:]
    torch.testing.assert_close(found[1:2], rest(x, contexts[1:])[1:2], atol=1e-12, rtol=0)
    assert torch.equal(found[2], x[2])
    contexts[0][1] = math.nan
    torch.testing.assert_close(layer(x, contexts, present=present)[1], found[1], atol=1e-12, rtol=0)


@each_mode
def test_rows_one_at_a_time_equal_the_whole(mode: str) -> None:
    layer, (x, contexts) = layer_of(mode), inputs()
    rows = torch.cat([layer(row, contexts) for row in x.split(1, 1)], 1)
    torch.testing.assert_close(rows, layer(x, contexts), atol=1e-12, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    layer, (x, contexts) = layer_of("parallel"), inputs()
    with pytest.raises(
        ValueError, match="mode must be one of serial, parallel, flat, hierarchical, got 'sum'"
    ):
        layer_of("sum")
    with pytest.raises(ValueError, match="at least one source, got sources=0"):
        layer_of("flat", sources=0)
    with pytest.raises(ValueError, match="2 sources need as many contexts and key_lengths, got 1 and 1"):
        layer(x, contexts[:1])
    with pytest.raises(ValueError, match=r"present must be boolean \(3, 2\), got torch.bool \(3, 1\)"):
        layer(x, contexts, present=torch.ones(3, 1, dtype=torch.bool))


DIGITS, LENGTH = 10, 8


class Restorer(nn.Module):
    """Copies of a string with erased digits to the string: queries are places, contexts the digits in their places."""

    def __init__(self, sources: int, mode: str, dim: int = 32) -> None:
        super().__init__()
        self.digits, self.places = nn.Embedding(DIGITS + 1, dim), nn.Embedding(LENGTH, dim)
        self.queries = nn.Embedding(LENGTH, dim)
        self.read = sc.nn.MultiSourceAttention(dim, 2, sources, mode)
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, DIGITS)

    def forward(self, copies: list[Tensor]) -> Tensor:
        contexts = [self.digits(c) + self.places.weight for c in copies]
        x = self.queries.weight.expand(len(copies[0]), -1, -1)
        return self.out(self.norm(self.read(x, contexts)))


def restored(sources: int, mode: str, seed: int = 0, steps: int = 90) -> float:
    """Share of digits that come back from so many copies, each with 30% erased by itself."""
    torch.manual_seed(seed)
    model, generator = Restorer(sources, mode), torch.Generator().manual_seed(seed)

    def batch(size: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        string = torch.randint(DIGITS, (size, LENGTH), generator=generator)
        gone = torch.rand(sources, size, LENGTH, generator=generator) < 0.3
        return [string.masked_fill(g, DIGITS) for g in gone], string

    def loss(step: int) -> Tensor:
        copies, string = batch(48, generator)
        return F.cross_entropy(model(copies).flatten(0, 1), string.flatten())

    train(model.parameters(), loss, steps, rate=1e-2)
    copies, string = batch(1024, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return float((model(copies).argmax(-1) == string).float().mean())


def test_two_noisy_copies_are_better_than_the_best_single_one() -> None:
    single = restored(1, "flat")
    assert single <= 0.7 + 0.3 / DIGITS + 0.02
    for mode in MODES:
        assert restored(2, mode) >= single + 0.12, mode
