"""S263, superlinear attention: search about sqrt(i) spans by summaries, read the few that were found and a window."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn import superlinear
from saccade.nn.superlinear import prefix_summaries, scored_pairs, span_grid, span_length
from saccade.nn.transformer import FeedForward
from saccade.tasks.needle import Needle
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import below, dense, exponent, flops, largest_temporary, train

pytestmark = pytest.mark.system("S263")


def tensors(n: int, batch: int = 2, heads: int = 2, d: int = 6, e: int = 5, r: int = 3) -> list[Tensor]:
    """q, k, v, routing queries and summaries."""
    return [torch.randn(batch, heads, n, size, dtype=torch.float64) for size in (d, d, e, r, r)]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, summaries: Tensor, top: int, scale: float, window: int
) -> Tensor:
    """Query by query, span by span."""
    rows = []
    for i in range(q.shape[2]):
        size = math.ceil(scale * math.sqrt(i + 1))
        spans = [range(lo, min(lo + size, i + 1)) for lo in range(0, i + 1, size)]
        ends = torch.stack([summaries[:, :, span[-1]] for span in spans], 2)
        scores = (ends * route[:, :, i, None]).sum(-1) / math.sqrt(route.shape[-1])
        out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                order = sorted(range(len(spans)), key=lambda t, s=scores[b, h]: float(-s[t].detach()))[:top]
                for share, t in zip(torch.softmax(scores[b, h, order], 0), order, strict=True):
                    keys = sorted({*spans[t], *range(max(0, i - window + 1), i + 1)})
                    w = torch.softmax(k[b, h, keys] @ q[b, h, i] / math.sqrt(q.shape[-1]), 0)
                    out[b, h] = out[b, h] + share * (w @ v[b, h, keys])
        rows.append(out)
    return torch.stack(rows, 2)


@pytest.mark.parametrize(
    ("n", "top", "scale", "window"), [(1, 1, 1.0, 1), (23, 2, 1.0, 3), (17, 1, 2.0, 4), (30, 9, 0.5, 40)]
)
def test_groups_of_rows_equal_the_formula_and_its_gradients(
    n: int, top: int, scale: float, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [x.requires_grad_() for x in tensors(n)]
    truth = written_out(*given, top, scale, window)
    wanted = torch.autograd.grad(truth.sin().sum(), given, allow_unused=True)
    for held in (superlinear.HELD, 0):
        monkeypatch.setattr(superlinear, "HELD", held)
        found = sc.nn.superlinear_attention(*given, top=top, scale=scale, window=window)
        torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
        for a, b in zip(torch.autograd.grad(found.sin().sum(), given), wanted, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.3])
def test_candidate_spans_hold_every_earlier_token_once(scale: float) -> None:
    for i in range(4097):
        spans = span_grid(i, scale)
        assert spans[0][0] == 0
        assert spans[-1][1] == i
        assert all(lo == hi + 1 for (_, hi), (lo, _) in pairwise(spans))
        assert all(hi - lo + 1 <= math.ceil(scale * math.sqrt(i + 1)) for lo, hi in spans)
    assert len(span_grid(4095, 1.0)) == 64


def test_one_span_over_the_whole_past_is_dense() -> None:
    q, k, v, route, summaries = tensors(40)
    found = sc.nn.superlinear_attention(q, k, v, route, summaries, top=1, scale=7.0, window=3)
    torch.testing.assert_close(found, dense(q, k, v, below(40)), atol=1e-12, rtol=0)
    layer = sc.nn.SuperlinearAttention(12, 2, top=1, scale=7.0, window=3).double()
    full = sc.nn.Attention(12, 2, "causal + rope").double()
    for linear, weight in zip(
        (full.query_proj, full.key_proj, full.value_proj), layer.qkv_proj.weight.chunk(3), strict=True
    ):
        linear.weight.data = weight.detach().clone()
    full.out_proj.load_state_dict(layer.out_proj.state_dict())
    x = torch.randn(2, 40, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), full(x), atol=1e-12, rtol=0)


def test_summaries_are_the_recurrence() -> None:
    u, decay = torch.randn(2, 3, 21, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    s, rows = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for j in range(21):
        s = decay * s + (1 - decay**2).sqrt() * u[:, :, j]
        rows.append(s)
    torch.testing.assert_close(prefix_summaries(u, decay), torch.stack(rows, 2), atol=1e-12, rtol=0)
    later = prefix_summaries(u[:, :, 8:], decay, rows[7])
    torch.testing.assert_close(later, torch.stack(rows[8:], 2), atol=1e-12, rtol=0)


def test_scored_pairs_grow_as_the_length_to_one_and_a_half() -> None:
    lengths = [1024, 2048, 4096, 8192, 16384]
    assert 1.4 <= exponent(lengths, [float(scored_pairs(n, 4, 1.0, 32)) for n in lengths]) <= 1.6
    n, size = 3000, span_length(torch.arange(3000), 1.5).tolist()
    grids = [span_grid(i, 1.5) for i in range(n)]
    by_hand = sum(len(g) + min(2, len(g)) * size[i] + min(i + 1, 8) for i, g in enumerate(grids))
    assert scored_pairs(n, 2, 1.5, 8) == by_hand


def test_work_follows_the_scored_pairs_and_no_square_is_held() -> None:
    lengths, counted = [512, 1024, 2048], []
    for n in lengths:
        given = [torch.randn(1, 1, n, 16) for _ in range(5)]
        whole = flops(lambda g=given: sc.nn.superlinear_attention(*g, window=16))
        near = flops(lambda g=given: sc.attend(*g[:3], "window(16)"))
        counted.append(float(whole - near))
    far = [scored_pairs(n, 4, 1.0, 16) - 16 * n for n in lengths]
    assert abs(exponent(lengths, counted) - exponent(lengths, [float(x) for x in far])) < 0.05
    assert 2 * 16 * far[-1] < counted[-1] < 2 * 2 * 16 * far[-1]
    assert largest_temporary(lambda: sc.nn.superlinear_attention(*given, window=16)) < 2048 * 2048 * 4 / 2


def test_the_search_is_trained_through_the_shares() -> None:
    layer, x = sc.nn.SuperlinearAttention(12, 2, top=2, window=2), torch.randn(2, 30, 12)
    layer(x).sin().sum().backward()
    for weight in (layer.route_proj.weight, layer.anchor_proj.weight, layer.decay):
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0


def test_later_tokens_and_padding_reach_nothing() -> None:
    layer = sc.nn.SuperlinearAttention(12, 2, top=2, window=3).double()
    x, lengths = torch.randn(3, 37, 12, dtype=torch.float64), torch.tensor([37, 20, 0])
    moved = torch.cat((x[:, :20], torch.randn_like(x[:, 20:])), 1)
    torch.testing.assert_close(layer(moved)[:, :20], layer(x)[:, :20], atol=1e-12, rtol=0)
    poisoned = x.clone()
    poisoned[1, 20:], poisoned[2] = math.nan, math.nan
    found = layer(poisoned, key_lengths=lengths)
    torch.testing.assert_close(found[1, :20], layer(x[1:2, :20])[0], atol=1e-12, rtol=0)
    assert (found[1, 20:] == 0).all()
    assert (found[2] == 0).all()
    assert torch.autograd.grad(found.sum(), layer.decay)[0].isfinite().all()


@pytest.mark.parametrize("pieces", [[1] * 29, [10, 1, 1, 17], [29]])
def test_decoding_equals_the_whole_call(pieces: list[int]) -> None:
    layer = sc.nn.SuperlinearAttention(12, 2, top=2, window=3).double()
    x = torch.randn(2, 29, 12, dtype=torch.float64)
    state, outs = layer.init_state(2), []
    for piece in x.split(pieces, 1):
        y, state = layer.step(piece, state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), atol=1e-12, rtol=0)
    assert state.length == 29


def test_no_token_gives_no_output() -> None:
    assert sc.nn.SuperlinearAttention(12, 2)(torch.zeros(2, 0, 12)).shape == (2, 0, 12)


def test_bad_arguments() -> None:
    q, k, v, route, summaries = tensors(9)
    with pytest.raises(ValueError, match=r"summaries \(B, H, S, r\) with L at most S; got"):
        sc.nn.superlinear_attention(q, k, v, route, summaries[..., :2])
    with pytest.raises(ValueError, match="with L at most S"):
        sc.nn.superlinear_attention(q, k[:, :, :5], v[:, :, :5], route, summaries[:, :, :5])
    with pytest.raises(ValueError, match="top=0, window=32 and scale=1"):
        sc.nn.superlinear_attention(q, k, v, route, summaries, top=0)
    with pytest.raises(ValueError, match="dim=10 must be a multiple of twice heads=2"):
        sc.nn.SuperlinearAttention(10, 2)
    with pytest.raises(ValueError, match="memory at least 4, got route_dim=16 and memory=3"):
        sc.nn.SuperlinearAttention(12, 2, memory=3)
    with pytest.raises(ValueError, match="scale above 0, got top=4, window=32 and scale=0"):
        sc.nn.SuperlinearAttention(12, 2, scale=0)


class Finder(nn.Module):
    """One layer around an attention."""

    def __init__(self, vocab: int, mix: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, 32)
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.mix, self.feed = mix, FeedForward(32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.mix(self.norms[0](x))
        x = x + self.feed(self.norms[1](x))
        return self.norms[2](x) @ self.embedding.weight.T


def found_needles(mix: nn.Module, steps: int, seed: int, length: int) -> float:
    """Accuracy on a needle at a random depth among `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    task = Needle(length=length, needles=1, queries=16, keys=2, values=4)
    model = Finder(task.vocab, mix)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(16, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=8e-3)
    tokens, targets = task.batch(256, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_two_of_eight_spans_find_the_needle_where_the_window_guesses() -> None:
    torch.manual_seed(11)
    routed = found_needles(sc.nn.SuperlinearAttention(32, 2, top=2, window=8, memory=16), 400, 11, 64)
    window = found_needles(sc.nn.Attention(32, 2, "window(8) + rope"), 150, 11, 64)
    assert routed >= 0.95
    assert window <= 0.35


@pytest.mark.slow
def test_the_needle_is_found_from_several_starts() -> None:
    for seed in (12, 13, 14):
        torch.manual_seed(seed)
        layer = sc.nn.SuperlinearAttention(32, 2, top=2, window=8, memory=16)
        assert found_needles(layer, 400, seed, 64) >= 0.95
