"""S238, PaTH: what stands between a key and a query turns the key by Householder maps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.path import transported
from saccade.nn.transformer import FeedForward
from saccade.tasks.flipflop import FlipFlop
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import below, dense, largest_temporary, train

pytestmark = pytest.mark.system("S238")


def tensors(n: int, batch: int = 2, heads: int = 2, d: int = 6, e: int = 5) -> list[Tensor]:
    """q, k, v, w of length 1, beta in 0..2."""
    q, k, w = torch.randn(3, batch, heads, n, d, dtype=torch.float64)
    v = torch.randn(batch, heads, n, e, dtype=torch.float64)
    return [q, k, v, F.normalize(w, dim=-1), 2 * torch.rand(batch, heads, n, dtype=torch.float64)]


def householder(w: Tensor, beta: Tensor) -> Tensor:
    """I - beta w w^T for each token, (..., d, d)."""
    eye = torch.eye(w.shape[-1], dtype=w.dtype)
    return eye - beta[..., None, None] * w.unsqueeze(-1) * w.unsqueeze(-2)


def by_products(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, forget: Tensor | None = None
) -> Tensor:
    """With explicit products of d x d matrices, a pair at a time."""
    maps, rows = householder(w, beta), []
    for i in range(q.shape[2]):
        product, s = torch.eye(q.shape[-1], dtype=q.dtype), []
        for j in range(i, -1, -1):
            turned = (product @ q[:, :, i].unsqueeze(-1)).squeeze(-1)
            gate = 0.0 if forget is None else forget[:, :, j + 1 : i + 1].sum(-1)
            s.append((k[:, :, j] * turned).sum(-1) / math.sqrt(q.shape[-1]) + gate)
            product = maps[:, :, j] @ product
        weights = torch.softmax(torch.stack(s[::-1], -1), -1)
        rows.append((weights.unsqueeze(-1) * v[:, :, : i + 1]).sum(2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("block", [1, 4, 7, 64])
@pytest.mark.parametrize("n", [1, 7, 23])
def test_blocks_equal_explicit_products(block: int, n: int) -> None:
    given = tensors(n)
    torch.testing.assert_close(
        sc.nn.path_attention(*given, block=block), by_products(*given), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("block", [4, 64])
def test_gradients_and_forget_gates_are_those_of_the_products(block: int) -> None:
    given = [*tensors(11), F.logsigmoid(torch.randn(2, 2, 11, dtype=torch.float64))]
    inputs = [x.requires_grad_() for x in given]
    found = sc.nn.path_attention(*inputs[:5], forget=inputs[5], block=block)
    expected = by_products(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(found)
    got, want = (torch.autograd.grad((x * weight).sum(), inputs) for x in (found, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_the_parts_of_a_block() -> None:
    q, k, _, w, beta = (x[0, 0] for x in tensors(8))
    maps = householder(w, beta)
    inner, start, end, whole = transported(q, k, w, beta)
    product = torch.eye(6, dtype=torch.float64)
    for t in range(8):
        product = product @ maps[t]
        torch.testing.assert_close(start[t], product @ q[t], atol=1e-12, rtol=0)
        torch.testing.assert_close(inner[t, t], k[t] @ q[t], atol=1e-12, rtol=0)
        turned = k[t]
        for later in range(t + 1, 8):
            turned = maps[later] @ turned
        torch.testing.assert_close(end[t], turned, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole, product, atol=1e-12, rtol=0)


def test_without_turns_it_is_softmax_without_positions() -> None:
    q, k, v, w, beta = tensors(30)
    found = sc.nn.path_attention(q, k, v, w, 0 * beta, block=8)
    torch.testing.assert_close(found, dense(q, k, v, below(30)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("gate", [False, True])
def test_decoding_by_turning_the_cached_keys_equals_the_blocks(gate: bool) -> None:
    layer = sc.nn.PathAttention(16, 2, rank=4, forget_gate=gate, block=8).double()
    nn.init.normal_(layer.filters)
    x, state, rows = torch.randn(2, 21, 16, dtype=torch.float64), layer.init_state(2), []
    for t in range(21):
        y, state = layer.step(x[:, t : t + 1], state)
        rows.append(y)
    assert state.length == 21
    torch.testing.assert_close(torch.cat(rows, 1), layer(x), atol=1e-12, rtol=0)


def test_later_tokens_and_padding_are_not_read() -> None:
    layer = sc.nn.PathAttention(16, 2, block=8).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    whole, alone = layer(x), layer(x[1:, :11])
    torch.testing.assert_close(whole[1:, :11], alone, atol=1e-12, rtol=0)
    x[1, 11:] = math.nan
    padded = layer(x, key_lengths=torch.tensor([21, 11]))
    torch.testing.assert_close(padded[1:, :11], alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(padded[:1], whole[:1], atol=1e-12, rtol=0)


def test_low_precision_and_no_tokens() -> None:
    given = tensors(20)
    truth = sc.nn.path_attention(*given)
    for dtype in (torch.float32, torch.bfloat16):
        found = sc.nn.path_attention(*(x.to(dtype) for x in given), block=8)
        assert found.dtype == dtype
        assert (found.double() - truth).abs().max() <= 16 * torch.finfo(dtype).eps
    assert sc.nn.path_attention(*tensors(0)).shape == (2, 2, 0, 5)


def test_no_length_x_length_buffer_is_held() -> None:
    given = [x.float() for x in tensors(2048, 1, 1, 16, 16)]
    assert largest_temporary(lambda: sc.nn.path_attention(*given)) <= 2048 * 64 * 4


def test_bad_arguments_are_refused() -> None:
    q, k, v, w, beta = tensors(5)
    with pytest.raises(ValueError, match="q, k and w are"):
        sc.nn.path_attention(q, k[:, :, :4], v, w, beta)
    with pytest.raises(ValueError, match=r"beta must be \(2, 2, 5\), got \(2, 2, 4\)"):
        sc.nn.path_attention(q, k, v, w, beta[:, :, :4])
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        sc.nn.path_attention(q, k, v, w, beta, block=0)
    with pytest.raises(ValueError, match="dim=9 must be a multiple of heads=2"):
        sc.nn.PathAttention(9, 2)
    with pytest.raises(ValueError, match="rank=0 and taps=3"):
        sc.nn.PathAttention(8, 2, rank=0)
    layer = sc.nn.PathAttention(8, 2)
    with pytest.raises(ValueError, match="a step takes one token, got 2"):
        layer.step(torch.zeros(1, 2, 8), layer.init_state(1))


class Model(nn.Module):
    """One layer on flip-flops, by PaTH or with rotary positions."""

    def __init__(self, path: bool, dim: int = 32) -> None:
        super().__init__()
        self.embedding, self.norms = nn.Embedding(5, dim), nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.attention = sc.nn.PathAttention(dim, 1) if path else sc.nn.Attention(dim, 2, "causal + rope")
        self.feed_forward, self.out = FeedForward(dim), nn.Linear(dim, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(self.norms[0](x))
        return self.out(self.norms[2](x + self.feed_forward(self.norms[1](x))))


def recalled(path: bool, steps: int) -> list[float]:
    """Accuracy with 80 and 98 % ignored at the trained 64 tokens, and with 80 % at 256."""
    torch.manual_seed(0)
    model, generator = Model(path), torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        tokens, targets = (FlipFlop(32, 0.6) if step < steps // 2 else FlipFlop(64)).batch(16, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    found = []
    for length, ignore in ((64, 0.8), (64, 0.98), (256, 0.8)):
        tokens, targets = FlipFlop(length, ignore).batch(16384 // length, torch.Generator().manual_seed(1))
        with torch.no_grad():
            found.append(accuracy(model(tokens), targets))
    return found


def test_one_layer_recalls_flip_flops_that_are_sparser_and_longer_than_those_of_training() -> None:
    assert min(recalled(True, 450)) >= 0.999
    assert max(recalled(False, 300)) < 0.98
