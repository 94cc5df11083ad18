"""S112, dual attention: relations between tokens as extra columns of the values."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.relational import SYMBOLS
from saccade.nn.transformer import FeedForward
from systems.helpers import largest_temporary, train

DIM, HEADS, N = 12, 2, 7
pytestmark = pytest.mark.system("S112")


def build(mechanism: str = "full", **options: object) -> sc.nn.RelationalAttention:
    return sc.nn.RelationalAttention(
        DIM, HEADS, mechanism, relations=3, relation_dim=5, symbol_dim=4, entries=9, **options
    ).double()


def formula(
    layer: sc.nn.RelationalAttention, x: Tensor, causal: bool, symbols: str, symmetric: bool
) -> Tensor:
    """Relations pair by pair: r_ij, read by W_r, weighted by a_ij."""
    size, rows = DIM // HEADS, []
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            heads = []
            for h in range(HEADS):
                own = slice(h * size, (h + 1) * size)
                query = layer.query_proj.weight[own] @ x[b, i]
                seen = range(i + 1 if causal else x.shape[1])
                s = torch.stack(
                    [query @ (layer.key_proj.weight[own] @ x[b, j]) / math.sqrt(size) for j in seen]
                )
                total = torch.zeros(size, dtype=x.dtype)
                for a, j in zip(s.softmax(0), seen, strict=True):
                    relations = []
                    for n in range(3):
                        part = slice(5 * n, 5 * n + 5)
                        left = layer.relation_query.weight[part] @ x[b, i]
                        side = layer.relation_query if symmetric else layer.relation_key
                        relations.append(left @ (side.weight[part] @ x[b, j]) / math.sqrt(5))
                    at = max(-4, min(4, j - i)) + 4 if symbols == "relative" else j
                    symbol = layer.symbols.vectors[at]
                    if symbols == "dictionary":
                        symbol = torch.softmax(layer.symbols.key.weight @ x[b, j], 0) @ layer.symbols.vectors
                    total = total + a * (torch.cat((torch.stack(relations), symbol)) @ layer.read[h])
                heads.append(total)
            rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("symbols", SYMBOLS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_the_loop_over_pairs_with_gradients(causal: bool, symbols: str, symmetric: bool) -> None:
    layer = build("causal" if causal else "full", symbols=symbols, symmetric=symmetric)
    x = torch.randn(2, N, DIM, dtype=torch.float64, requires_grad=True)
    found, want = layer(x), formula(layer, x, causal, symbols, symmetric)
    torch.testing.assert_close(found, want)
    leaves, weight = [x, *layer.parameters()], torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_without_relational_heads_it_is_multi_head_attention() -> None:
    dual, plain = sc.nn.DualAttention(16, 4, 0, "causal"), sc.nn.Attention(16, 4, "causal")
    plain.load_state_dict(dual.sensory.state_dict())
    x = torch.randn(2, N, 16)
    assert torch.equal(dual(x), plain(x))


def test_both_kinds_of_heads_share_an_output_projection() -> None:
    dual = sc.nn.DualAttention(16, 4, 1, "causal + rope", relations=2)
    x, lengths = torch.randn(2, N, 16), torch.tensor([N, 3])
    torch.testing.assert_close(dual(x), dual.sensory(x) + dual.relational(x))
    assert dual.sensory.out_proj.weight.shape == (16, 12)
    assert dual.relational.out_proj.weight.shape == (16, 4)
    torch.testing.assert_close(dual(x, key_lengths=lengths)[1, :3], dual(x[1:, :3])[0])
    assert sc.nn.DualAttention(16, 4, 4).sensory is None


@pytest.mark.parametrize("symbols", SYMBOLS)
def test_decoding_equals_the_whole(symbols: str) -> None:
    layer = build("causal + rope", symbols=symbols)
    x = torch.randn(2, N, DIM, dtype=torch.float64)
    state, rows = layer.init_state(2), []
    for part in (slice(0, 3), *(slice(t, t + 1) for t in range(3, N))):
        y, state = layer.step(x[:, part], state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), layer(x))


@pytest.mark.parametrize("symbols", SYMBOLS)
def test_no_relation_of_a_pair_is_stored(symbols: str) -> None:
    """The largest thing that a call makes grows with the length, not with its square."""
    layer = sc.nn.RelationalAttention(16, 2, "causal", relations=4, symbols=symbols, entries=2049)
    with torch.no_grad():
        short, long = (largest_temporary(lambda n=n: layer(torch.zeros(1, n, 16))) for n in (512, 2048))
    assert long <= 4.2 * short


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="symbols must be one of dictionary, position, relative, got 'none'"):
        build(symbols="none")
    with pytest.raises(ValueError, match="10 tokens are more than the 9 positions"):
        build(symbols="position")(torch.zeros(1, 10, DIM, dtype=torch.float64))
    with pytest.raises(ValueError, match="an odd number of entries of at least 3, got 32"):
        sc.nn.RelationalAttention(DIM, HEADS, symbols="relative")
    with pytest.raises(sc.NotSupported, match="belong to pairs, which a recurrent mechanism has none of"):
        build("causal + linear", symbols="relative")
    for text in ("mqa", "additive", "causal + out_gate", "sources(q=a)"):
        with pytest.raises(sc.NotSupported, match="take a mechanism that owns nothing"):
            build(text)
    with pytest.raises(ValueError, match="relational heads are 0 to 4"):
        sc.nn.DualAttention(16, 4, 5)


WIDTH, SHOWN = 16, 500


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two random vectors, (count, 2, WIDTH), and whether they are the same."""
    x = torch.randn(count, 2, WIDTH, generator=generator)
    same = torch.randint(2, (count,), generator=generator)
    x[:, 1] = torch.where(same[:, None] == 1, x[:, 0], x[:, 1])
    return x, same


def samples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random vector, three choices of which one equals it, (count, 4, WIDTH), and which."""
    x = torch.randn(count, 4, WIDTH, generator=generator)
    which = torch.randint(3, (count,), generator=generator)
    x[torch.arange(count), 1 + which] = x[:, 0]
    return x, which


class Judge(nn.Module):
    """One block of attention and a feed-forward layer over the tokens, read off all of them."""

    def __init__(self, tokens: int, answers: int, relational: bool, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(WIDTH, dim), nn.Parameter(0.1 * torch.randn(tokens, dim))
        self.attention: nn.Module = (
            sc.nn.DualAttention(dim, 4, 2, relations=4, relation_dim=16, symmetric=True)
            if relational
            else sc.nn.Attention(dim, 4)
        )
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, 4 if relational else 6)
        self.answer = nn.Linear(tokens * dim, answers)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, tokens, WIDTH) to logits (B, answers)."""
        x = self.embed(x) + self.places
        x = x + self.attention(x)
        return self.answer((x + self.feed_forward(self.norm(x))).flatten(1))


@cache
def accuracy(task: str, relational: bool, seed: int, steps: int = 800) -> float:
    """Accuracy on new vectors after training on 500 samples."""
    torch.manual_seed(seed)
    draw, tokens, answers = (pairs, 2, 2) if task == "pairs" else (samples, 4, 3)
    model, generator = Judge(tokens, answers, relational), torch.Generator().manual_seed(seed)
    x, y = draw(SHOWN, generator)

    def loss(step: int) -> Tensor:
        rows = torch.randint(SHOWN, (64,), generator=generator)
        return F.cross_entropy(model(x[rows]), y[rows])

    train(model.parameters(), loss, steps, 5e-3)
    x, y = draw(1000, generator)
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def test_a_match_is_found_among_vectors_never_seen() -> None:
    assert accuracy("samples", True, 0, 300) >= accuracy("samples", False, 0, 300) + 0.15


@pytest.mark.slow
def test_five_hundred_samples_teach_relations_and_not_plain_attention() -> None:
    """Means of three runs."""
    mine, plain = (sum(accuracy("samples", r, seed) for seed in range(3)) / 3 for r in (True, False))
    assert mine >= 0.9, mine
    assert mine >= plain + 0.15, (mine, plain)
