"""S123, complex positional encoding: the imaginary part of the first layer's tokens says where they stand."""

from __future__ import annotations

import cmath
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import Block, FeedForward
from saccade.tasks.previous import Previous
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import qkv, stepwise, train

pytestmark = pytest.mark.system("S123")


@pytest.mark.parametrize("phase", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_scores_by_complex_numbers(phase: bool, causal: bool) -> None:
    q, k, v = qkv(2, 4, 5, 6, kv=2, keys=7)
    text = ("causal + " if causal else "") + f"cope_complex(phase={str(phase).lower()})"
    found = sc.attend(q, k, v, text)
    for b, h, i in itertools.product(range(2), range(4), range(5)):
        s = []
        for j in range(i + 3 if causal else 7):
            x, y = q[b, h, i].tolist(), k[b, h // 2, j].tolist()
            z = sum(complex(x[m], x[m + 3]) * complex(y[m], y[m + 3]).conjugate() for m in range(3))
            z = complex(z) / math.sqrt(3)
            s.append(z.real * (math.cos(cmath.phase(z)) if phase else 1.0))
        expected = torch.softmax(torch.tensor(s, dtype=torch.float64), 0) @ v[b, h // 2, : len(s)]
        torch.testing.assert_close(found[b, h, i], expected, atol=1e-9, rtol=0)


def test_the_product_runs_on_every_dot_kernel_and_the_phase_does_not() -> None:
    shape = (1, 4, 2048, 64)
    assert sc.plan("causal + cope_complex", shape).kernel in ("native", "sdpa (flash)")
    assert sc.plan("causal + cope_complex(phase=true)", shape).kernel == "slab"


def test_odd_heads_have_no_halves() -> None:
    with pytest.raises(sc.NotSupported, match="head_dim must be even, got 5"):
        sc.attend(*qkv(1, 1, 3, 5), "cope_complex")


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(16, 2, "causal + cope_complex(phase=true)").double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)


def test_the_layer_by_complex_matrices() -> None:
    layer = sc.nn.ComplexAttention(8, 2, gamma=0.7).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    p = torch.empty(5, 8, dtype=torch.float64)
    for n, m in itertools.product(range(5), range(4)):
        angle = n * 10000 ** (-2 * m / 8)
        p[n, 2 * m], p[n, 2 * m + 1] = math.sin(angle), math.cos(angle)
    z = torch.complex(x[0], 0.7 * p)
    w = torch.complex(layer.real.weight, layer.imaginary.weight)
    v, heads = layer.value_proj(x)[0], []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        q, k = (z @ w[at : at + 8].mT for at in (0, 8))
        s = (q[:, own] @ k[:, own].mH).real / 2
        heads.append(torch.softmax(s, -1) @ v[:, own])
    torch.testing.assert_close(layer(x)[0], layer.out_proj(torch.cat(heads, -1)), atol=1e-12, rtol=0)


def test_without_positions_and_with_real_weights_it_is_a_plain_layer() -> None:
    layer = sc.nn.ComplexAttention(16, 4, gamma=0.0, complex_weights=False).double()
    plain = sc.nn.Attention(16, 4).double()
    with torch.no_grad():
        plain.query_proj.weight.copy_(layer.real.weight[:16])
        plain.key_proj.weight.copy_(layer.real.weight[16:])
        plain.value_proj.weight.copy_(layer.value_proj.weight)
        plain.out_proj.weight.copy_(layer.out_proj.weight)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("max_length", [None, 12])
def test_only_with_positions_does_order_matter(max_length: int | None) -> None:
    x, order = torch.randn(2, 9, 16, dtype=torch.float64), torch.randperm(9)
    for gamma in (0.0, 1.0):
        layer = sc.nn.ComplexAttention(16, 4, gamma=gamma, max_length=max_length).double()
        moved = float((layer(x[:, order]) - layer(x)[:, order]).detach().abs().max())
        assert moved > 1e-3 if gamma else moved < 1e-12


def test_padding_is_not_read() -> None:
    layer, x = sc.nn.ComplexAttention(16, 4).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    alone = layer(x[1:, :4])
    x[1, 4:] = math.nan
    found = layer(x, key_lengths=torch.tensor([9, 4]))
    torch.testing.assert_close(found[1:, :4], alone, atol=1e-12, rtol=0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="dim=15 and heads=3"):
        sc.nn.ComplexAttention(15, 3)
    with pytest.raises(ValueError, match="needs a complex score, as in cope_complex, got full"):
        sc.nn.ComplexAttention(16, 4, "full")
    with pytest.raises(ValueError, match="5 tokens are more than max_length=4"):
        sc.nn.ComplexAttention(16, 4, max_length=4)(torch.zeros(1, 5, 16))


class Model(nn.Module):
    """Two layers: the complex one, then an ordinary one without positions."""

    def __init__(self, gamma: float, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, dim)
        self.first, self.norm = sc.nn.ComplexAttention(dim, heads, gamma=gamma), nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim)
        self.second = Block(dim, heads, sc.mechanism("full"))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.first(x)
        return self.out(self.second(x + self.feed_forward(self.norm(x))))


def same_as_before(gamma: float, steps: int) -> float:
    """Accuracy in telling whether a token equals the one before it."""
    torch.manual_seed(0)
    task, generator = Previous(length=32, symbols=2, equal=True), torch.Generator().manual_seed(0)
    model = Model(gamma)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    tokens, targets = task.batch(256, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_it_tells_whether_a_token_equals_the_one_before_and_no_position_does_not() -> None:
    assert same_as_before(1.0, 300) >= 0.95
    assert same_as_before(0.0, 200) <= 0.75
