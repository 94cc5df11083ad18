"""S216, TAPA as described: amplitudes times the cosine of a phase that distance winds up."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from parts import tools
from saccade.nn import Transformer
from saccade.parts.pair import Context, Program, map_tokens
from saccade.systems.tapa import PhaseDot
from saccade.tasks.text import VOCAB, load
from systems.helpers import FRESH, below, qkv, stepwise, train_on_text

HEADS, D = 4, 6
pytestmark = pytest.mark.system("S216")


def logit(q: list[float], k: list[float], gap: int, share: float, alpha: float) -> float:
    """One score from the formula."""
    at = min(len(q) - 1, max(1, round(share * len(q))))
    a = sum(x * y for x, y in zip(q[:at], k[:at], strict=True)) / math.sqrt(at)
    p = sum(x * y for x, y in zip(q[at:], k[at:], strict=True)) / math.sqrt(len(q) - at)
    return a * math.cos(2 * math.pi * abs(gap) ** alpha * p)


@pytest.mark.parametrize(("share", "alpha"), [(0.5, 0.5), (0.3, 1.0), (0.9, 0.1)])
@pytest.mark.parametrize("kv", [2, 4])
def test_scores_by_loops(share: float, alpha: float, kv: int) -> None:
    q, k, _ = qkv(1, HEADS, 5, D, kv=kv, keys=8)
    got = tools.logits(sc.Pairwise(score=PhaseDot(share, alpha)), q, k)
    for h in range(HEADS):
        for i in range(5):
            for j in range(8):
                want = logit(q[0, h, i].tolist(), k[0, h * kv // HEADS, j].tolist(), i + 3 - j, share, alpha)
                assert got[0, h, i, j].item() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("kernel", ["slab", "reference"])
def test_every_path_and_its_gradients(kernel: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 6, 4))
    s = torch.stack(
        [
            torch.stack([amplitude(q[:, :, i], k[:, :, j], abs(i - j)) for j in range(6)], -1)
            for i in range(6)
        ],
        -2,
    )
    want = torch.softmax(s.masked_fill(~below(6), -math.inf), -1) @ v
    found = sc.attend(q, k, v, "causal + tapa", kernel=kernel)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (found, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def amplitude(q: Tensor, k: Tensor, gap: int) -> Tensor:
    """Scores of one pair of positions, for 4 channels, half of them phase."""
    a, p = ((q[..., c] * k[..., c]).sum(-1) / math.sqrt(2) for c in (slice(0, 2), slice(2, 4)))
    return a * torch.cos(2 * math.pi * gap**0.5 * p)


def test_without_distance_or_phase_the_score_is_the_amplitude() -> None:
    q, k, _ = qkv(2, HEADS, 7, D)
    plain = q[..., :3] @ k[..., :3].transpose(-1, -2) / math.sqrt(3)
    m = sc.Pairwise(score=PhaseDot())
    own = tools.logits(m, q, k).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(own, plain.diagonal(dim1=-2, dim2=-1), atol=1e-14, rtol=0)
    flat = torch.cat((q[..., :3], torch.zeros_like(q[..., 3:])), -1)
    torch.testing.assert_close(tools.logits(m, flat, k), plain, atol=1e-14, rtol=0)


def test_tiles_equal_the_dense_computation_in_float32() -> None:
    q, k, v = qkv(1, 2, 700, 16, dtype=torch.float32)
    gap = (torch.arange(700)[:, None] - torch.arange(700)).abs()
    a, p = (q[..., c] @ k[..., c].transpose(-1, -2) / math.sqrt(8) for c in (slice(0, 8), slice(8, 16)))
    s = (a * torch.cos(2 * math.pi * gap.sqrt() * p)).masked_fill(~below(700), -math.inf)
    torch.testing.assert_close(
        sc.attend(q, k, v, "causal + tapa"), torch.softmax(s, -1) @ v, atol=1e-3, rtol=1e-3
    )


def statistics(text: str, gap: int) -> tuple[float, float]:
    """Mean and variance of the score of tokens `gap` apart, over draws with mean 0.6."""
    q, k = 0.6 + torch.randn(2, 20000, 1, 1, 64)
    m = sc.mechanism(text)
    assert isinstance(m, sc.Pairwise)
    program = Program.bind(m, map_tokens(m.tokens, Context(q, k, k, offset=gap), 1))
    s = program.logits(tools.tile(program))
    return float(s.mean()), float(s.var())


def test_the_mean_score_dies_with_distance_and_its_variance_does_not() -> None:
    near, far = statistics("tapa", 0), statistics("tapa", 512)
    assert abs(far[0]) <= 0.05 * abs(near[0])
    assert far[1] >= 0.9 * near[1]
    assert statistics("rope", 512)[0] >= 0.15 * statistics("rope", 0)[0]


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(24, 4, "causal + tapa").double()
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_bad_arguments() -> None:
    with pytest.raises(sc.MechanismError, match="share must be a number below 1"):
        sc.mechanism("tapa(1.0)")
    with pytest.raises(sc.MechanismError, match="alpha must be a number above 0"):
        sc.mechanism("tapa(alpha=0)")
    q, k, v = qkv(1, 1, 3, 1)
    with pytest.raises(ValueError, match="splits the channels"):
        sc.attend(q, k, v, "tapa")


def tails(text: str, steps: int, dim: int, lengths: tuple[int, int]) -> tuple[float, float]:
    """Loss of the last 16 bytes of held-out windows of both lengths, trained at the first; the bytes are the same."""
    corpus = load(window=lengths[1])
    torch.manual_seed(FRESH)
    model = Transformer(VOCAB, dim, depth=2, heads=dim // 16, mechanism=text, positions="none")
    train_on_text(model, corpus, steps, lengths[0], seed=FRESH)
    rows, found = corpus.windows(lengths[1])[:96], []
    for length in lengths:
        with torch.no_grad():
            logits = torch.cat([model(x[:, -1 - length : -1])[:, -16:] for x in rows.split(32)])
        found.append(float(F.cross_entropy(logits.flatten(0, 1), rows[:, -16:].flatten())))
    return found[0], found[1]


def test_a_short_language_model_reads_eight_times_its_length_as_well_where_rope_gets_worse() -> None:
    near, far = tails("tapa", steps=200, dim=32, lengths=(32, 256))
    turned = tails("rope", steps=200, dim=32, lengths=(32, 256))
    assert near < 3.0
    assert far < near + 0.1
    assert turned[1] > turned[0] + 0.15


@pytest.mark.slow
def test_text_at_eight_times_the_trained_length() -> None:
    """The claim holds, but by a model that reads its context little: RoPE is far better at the trained length."""
    near, far = tails("tapa", steps=500, dim=64, lengths=(64, 512))
    assert abs(far - near) < 0.1
    turned = tails("rope", steps=500, dim=64, lengths=(64, 512))
    assert turned[1] > turned[0] + 1
    assert far < turned[1]
    assert turned[0] < near
