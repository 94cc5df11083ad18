"""S139, Luong attention: three scores, global and local, and an LSTM that writes strings backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.parts.base import Sizes
from saccade.systems.luong_seq2seq import LuongSeq2Seq
from saccade.tasks.copy import Copy
from saccade.tasks.metric import exact_match
from saccade.tasks.recall import SILENT
from systems.helpers import dense, qkv, train

HEADS, D = 2, 6
BACKWARDS = Copy(length=16, symbols=20, shortest=8, reverse=True)
pytestmark = pytest.mark.system("S139")


def weights_of(mechanism: str) -> dict[str, Tensor]:
    """Fresh params of a mechanism, none of them at its starting value."""
    declared = sc.mechanism(mechanism).weights(Sizes(HEADS, HEADS, D, D))
    return {name: torch.randn(w.shape, dtype=torch.float64) for name, w in declared.items()}


def test_dot_is_the_unscaled_product() -> None:
    q, k, v = qkv(2, HEADS, 5, D, keys=9)
    found = sc.attend(q, k, v, "luong_attention(score=dot)")
    torch.testing.assert_close(found, dense(q * D**0.5, k, v), atol=1e-12, rtol=0)


def test_general_is_the_bilinear_product_and_dot_when_w_is_the_identity() -> None:
    q, k, v = qkv(2, HEADS, 5, D, keys=9)
    params = weights_of("luong_attention(score=general)")
    found = sc.attend(q, k, v, "luong_attention(score=general)", params=params)
    expected = torch.softmax(torch.einsum("bhqd,hde,bhke->bhqk", q, params["bilinear"], k), -1) @ v
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    same = {"bilinear": torch.eye(D, dtype=torch.float64).expand(HEADS, D, D)}
    torch.testing.assert_close(
        sc.attend(q, k, v, "luong_attention(score=general)", params=same),
        sc.attend(q, k, v, "luong_attention(score=dot)"),
        atol=1e-12,
        rtol=0,
    )


def test_concat_is_a_tanh_layer_on_query_and_key() -> None:
    q, k, v = qkv(2, HEADS, 5, D, keys=9)
    params = weights_of("luong_attention(score=concat)")
    joined = torch.cat((params["additive_q"], params["additive_k"]), dim=1)
    s = torch.empty(2, HEADS, 5, 9, dtype=torch.float64)
    for i in range(5):
        for j in range(9):
            both = torch.cat((q[:, :, i], k[:, :, j]), dim=-1)
            hidden = torch.tanh(torch.einsum("bhd,hda->bha", both, joined))
            s[:, :, i, j] = (hidden * params["additive_v"]).sum(-1)
    found = sc.attend(q, k, v, "luong_attention(score=concat)", params=params)
    torch.testing.assert_close(found, torch.softmax(s, -1) @ v, atol=1e-12, rtol=0)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize("half", [12, 40])
def test_a_window_as_wide_as_the_source_is_global(score: str, half: int) -> None:
    q, k, v = qkv(2, HEADS, 12, D)
    params = weights_of(f"luong_attention(score={score})")
    local = sc.attend(q, k, v, f"luong_attention(score={score}, local=monotonic, half={half})", params=params)
    everywhere = sc.attend(q, k, v, f"luong_attention(score={score})", params=params)
    torch.testing.assert_close(local, everywhere, atol=1e-12, rtol=0)


def test_monotonic_reads_the_window_around_its_own_place() -> None:
    q, k, v = qkv(2, HEADS, 12, D)
    at = torch.arange(12)
    near = (at[:, None] - at).abs() <= 2
    found = sc.attend(q, k, v, "luong_attention(score=dot, local=monotonic, half=2)")
    torch.testing.assert_close(found, dense(q * D**0.5, k, v, near), atol=1e-12, rtol=0)


def test_predictive_weights_are_those_of_the_window_times_a_gaussian() -> None:
    half, keys = 3, 15
    q, k, v = qkv(2, HEADS, 4, D, keys=keys)
    centre = torch.rand(2, HEADS, 4, dtype=torch.float64) * keys
    text = f"luong_attention(score=dot, local=predictive, half={half})"
    found = sc.attend(q, k, v, text, streams={"centre": centre}, need=("out", "weights"))
    gap = torch.arange(keys) - centre[..., None]
    s = (q @ k.transpose(-1, -2)).masked_fill(gap.abs() > half, -torch.inf)
    expected = torch.softmax(s, -1) * torch.exp(-gap.square() / (2 * (half / 2) ** 2))
    torch.testing.assert_close(found.weights, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.out, expected @ v, atol=1e-12, rtol=0)
    assert found.weights.sum(-1).max() < 1


@pytest.mark.parametrize("half", [2, 8])
def test_predictive_weights_peak_at_the_centre(half: int) -> None:
    """Where scores differ by less than the Gaussian does in one step; strong scores may move the peak."""
    q, k, v = qkv(4, HEADS, 50, D, keys=60)
    centre = 1 + torch.rand(4, HEADS, 50, dtype=torch.float64) * 58
    text = f"luong_attention(score=dot, local=predictive, half={half})"
    steep = 1 / (2 * (half / 2) ** 2)
    for q_ in (torch.zeros_like(q), q * steep / 2 / (q @ k.transpose(-1, -2)).abs().max()):
        need = ("out", sc.Weights())
        peak = sc.attend(q_, k, v, text, streams={"centre": centre}, need=need).weights.argmax(-1)
        assert (peak - centre).abs().max() <= 1


def test_the_centre_is_learned_through_the_gaussian() -> None:
    q, k, v = qkv(1, HEADS, 4, D, keys=15)
    centre = (torch.rand(1, HEADS, 4, dtype=torch.float64) * 15).requires_grad_()
    text = "luong_attention(score=dot, local=predictive, half=5)"
    choice = sc.attend(q, k, v, text, streams={"centre": centre}, need=("out", "selection")).selection
    assert torch.autograd.gradcheck(
        lambda c: sc.attend(q, k, v, text, streams={"centre": c}, selection=choice), (centre,)
    )


def test_a_layer_predicts_its_centres_inside_the_source() -> None:
    layer = sc.nn.Attention(16, HEADS, "luong_attention(local=predictive, half=2)")
    choice = layer(torch.randn(3, 7, 16) * 9, torch.randn(3, 11, 16), need=("out", "selection")).selection
    centre = (choice.lo + choice.hi) / 2
    assert centre.min() >= 0
    assert centre.max() <= 11


def test_the_decoder_refuses_windows_around_a_place_that_it_does_not_have() -> None:
    with pytest.raises(sc.NotSupported, match="local=predictive"):
        LuongSeq2Seq(vocab=8, dim=8, mechanism="luong_attention(local=monotonic, half=2)")


def test_padding_of_the_source_does_not_reach_the_decoder() -> None:
    task = BACKWARDS
    source, lengths, targets = task.pairs(8, torch.Generator().manual_seed(0))
    model = LuongSeq2Seq(task.vocab, 16)
    other = source.where(torch.arange(task.length) < lengths[:, None], 3)
    torch.testing.assert_close(
        model(source, task.shifted(targets), lengths), model(other, task.shifted(targets), lengths)
    )


def backwards(mechanism: str | None, steps: int) -> float:
    """Exact match of an LSTM that learned to write strings backwards."""
    task = BACKWARDS
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = LuongSeq2Seq(task.vocab, 64, mechanism)

    def loss(step: int) -> Tensor:
        source, lengths, targets = task.pairs(64, generator)
        logits = model(source, task.shifted(targets), lengths)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    source, lengths, targets = task.pairs(500, torch.Generator().manual_seed(1))
    return exact_match(model.greedy(source, task.end, targets.shape[1], lengths), targets)


def test_an_lstm_writes_strings_backwards_with_attention_and_not_without() -> None:
    source, _, targets = BACKWARDS.pairs(500, torch.Generator().manual_seed(1))
    assert exact_match(source, targets[:, :-1]) == 0
    assert backwards("luong_attention", steps=400) >= 0.95
    assert backwards(None, steps=400) <= 0.5


@pytest.mark.slow
def test_an_lstm_writes_strings_backwards_with_predicted_centres() -> None:
    assert backwards("luong_attention(local=predictive, half=4)", steps=500) >= 0.9
