"""S197, Based: a Taylor state beside exact windows and short convolutions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.parts.feature import Taylor
from saccade.systems import based
from saccade.tasks.recall import SILENT, Recall, accuracy
from systems.helpers import FRESH, qkv, stepwise, train

pytestmark = pytest.mark.system("S197")


def written_out(q: Tensor, k: Tensor, v: Tensor, order: int = 2) -> Tensor:
    """Row by row with the series itself, no features."""
    b, h, length, d = q.shape
    rows = []
    for n in range(b):
        for head in range(h):
            g = head * k.shape[1] // h
            for i in range(length):
                s = [q[n, head, i] @ k[n, g, j] / math.sqrt(d) for j in range(i + 1)]
                w = [1 + x + (x * x / 2 if order == 2 else 0) for x in s]
                rows.append(sum(x * v[n, g, j] for j, x in enumerate(w)) / sum(w))
    return torch.stack(rows).view(b, h, length, -1)


@pytest.mark.parametrize("d", [1, 2, 7, 16])
def test_features_meet_as_the_series(d: int) -> None:
    q, k = torch.randn(2, 1, 2, 9, d, dtype=torch.float64)
    phi_q, phi_k = (Taylor().map(x, side, None, {})[0] for x, side in ((q, "q"), (k, "k")))
    s = q @ k.mT / math.sqrt(d)
    torch.testing.assert_close(phi_q @ phi_k.mT, 1 + s + s * s / 2, atol=1e-13, rtol=0)
    assert phi_q.shape[-1] == Taylor().size(d) == 1 + d + d * (d + 1) // 2
    first, other = (Taylor(1, 0.3).map(x, "q", None, {})[0] for x in (q, k))
    torch.testing.assert_close(first @ other.mT, 1 + 0.3 * (q @ k.mT), atol=1e-13, rtol=0)


def test_a_product_of_two_channels_is_kept_once() -> None:
    assert Taylor().size(16) == 153  # 273 where it is kept twice
    assert Taylor(1).size(16) == 17


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_state_chunks_steps_and_squares_agree(kv: int) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 13, 6, kv=kv))
    expected = written_out(q, k, v)
    grads = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    for kernel in ("recurrent", "reference"):
        found = sc.attend(q, k, v, "based", kernel=kernel)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        for got, wanted in zip(torch.autograd.grad(found.sin().sum(), (q, k, v)), grads, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)
    state, rows = sc.init_state("based", 2, kv, 6, heads=4, dtype=torch.float64), []
    for t in range(13):
        one = (x[:, :, t : t + 1] for x in (q, k, v))
        found = sc.attend(*one, "based", state=state, need=("out", "state"))
        assert found.state is not None
        state = found.state
        rows.append(found.out)
    torch.testing.assert_close(torch.cat(rows, 2), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_lengths_that_no_chunk_divides(length: int) -> None:
    q, k, v = qkv(1, 2, length, 4)
    s = q @ k.mT / 2
    w = (1 + s + s * s / 2).tril()
    torch.testing.assert_close(
        sc.attend(q, k, v, "based", kernel="recurrent"), w @ v / w.sum(-1, keepdim=True), atol=1e-10, rtol=0
    )


def test_bfloat16_stays_near() -> None:
    q, k, v = qkv(1, 4, 200, 16, kv=2, dtype=torch.bfloat16)
    found = sc.attend(q, k, v, "based")
    assert found.dtype == torch.bfloat16
    wanted = sc.attend(q.double(), k.double(), v.double(), "based")
    assert (found.double() - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_weights_are_positive_and_far_from_zero() -> None:
    """1 + s + s^2 / 2 is at least 1/2, so no denominator is near zero, however large q and k are."""
    for size in (0.0, 1.0, 1e3):
        q, k, v = (size * x for x in qkv(1, 1, 40, 8))
        found = sc.attend(q, k, v, "based", need=("out", "weights"))
        assert found.weights is not None
        assert float(found.weights.min()) >= 0
        torch.testing.assert_close(found.weights.sum(-1), torch.ones(1, 1, 40, dtype=torch.float64))
        assert bool(torch.isfinite(found.out).all())


def test_wrong_orders_and_a_ratio_that_may_cancel_are_refused() -> None:
    for text, words in (
        ("taylor(3)", "order must be 1 or 2, got 3"),
        ("taylor(0)", "at least 1"),
        ("taylor(2, scale=0)", "above 0"),
        ("causal + taylor(1) + ratio", "ratio needs denominator, which taylor breaks"),
    ):
        with pytest.raises(sc.MechanismError, match=words):
            sc.mechanism(text)


def test_values_are_convolved_with_the_past() -> None:
    q, k, v = qkv(1, 4, 6, 3, kv=2)
    taps = torch.randn(2, 3, 3, dtype=torch.float64)
    found = sc.attend(q, k, v, "uniform + window(1) + value_conv(3)", params={"value_conv": taps})
    for h in range(4):
        for i in range(6):
            wanted = sum(taps[h // 2, t] * v[0, h // 2, i - t] for t in range(3) if i >= t)
            torch.testing.assert_close(found[0, h, i], torch.as_tensor(wanted))


def test_the_mix_of_layers_decodes_as_it_reads_and_keeps_a_bounded_state() -> None:
    mix = based.layers(window=4)
    assert mix[1:3] == ("based", "window(4)")
    model = sc.nn.Transformer(11, dim=16, depth=5, heads=2, mechanism=mix, positions="none", head_dim=4)
    model = model.double()
    assert [str(b.attention.mechanism) for b in model.blocks] == [
        str(sc.causal(sc.mechanism(m))) for m in mix
    ]
    assert model.blocks[1].attention.query_proj.weight.shape == (8, 16)
    tokens = torch.randint(11, (2, 40))
    states, outs, held = model.init_state(2), [], []
    for t in range(40):
        logits, states = model.step(tokens[:, t : t + 1], states)
        outs.append(logits)
        held.append(sum(s.nbytes for s in states))
    torch.testing.assert_close(torch.cat(outs, 1), model(tokens), atol=1e-10, rtol=0)
    assert max(held[20:]) <= max(held[:20])


def test_mechanisms_take_turns_over_the_blocks() -> None:
    model = sc.nn.Transformer(5, dim=8, depth=5, heads=2, mechanism=("based", "window(2)"))
    texts = [str(b.attention.mechanism) for b in model.blocks]
    assert texts == ["based", "window(2)", "based", "window(2)", "based"]
    with pytest.raises(ValueError, match="at least one mechanism, got none"):
        sc.nn.Transformer(5, mechanism=())


def test_the_state_holds_so_many_numbers_and_does_not_grow() -> None:
    layer = sc.nn.Attention(32, 2, "based", head_dim=4, value_dim=16)
    held = stepwise(layer, torch.randn(1, 20, 32))[1]
    assert held == [2 * (15 * 16 + 15 + 1) * 4] * 20


def recalled(text: str, seed: int, pairs: int = 8) -> float:
    """Accuracy of a one-layer model on pairs that stand more than 8 tokens before anything is asked."""
    torch.manual_seed(seed)
    task = Recall(2 * pairs + 24, pairs=pairs, queries=16, keys=16, values=16)
    model = sc.nn.Transformer(task.vocab, 32, 1, 4, mechanism=text, positions="none", head_dim=4)
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator, pairs=pairs >> step % 3)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps=400, rate=1e-2)
    tokens, targets = task.batch(256, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_recalls_what_no_window_reaches() -> None:
    assert Recall(40, pairs=8, queries=16).beyond > 8
    state, window = (recalled(f"kv_shift + {m}", FRESH) for m in ("based", "window(8)"))
    assert state >= window + 0.3
    assert state > 0.8


def told_apart(d: int, seed: int, pairs: int = 32) -> float:
    """The share of random keys of d channels, q = k of s = 4, whose own random value is the nearest to what is read."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(64, 1, pairs, d, generator=generator)
    keys = 2 * d**0.25 * F.normalize(keys, dim=-1)
    values = F.normalize(torch.randn(64, 1, pairs, 32, generator=generator), dim=-1)
    out = sc.attend(keys, keys, values, "taylor + ratio")
    return float(((out @ values.mT).argmax(-1) == torch.arange(pairs)).float().mean())


def test_larger_states_tell_more_keys_apart() -> None:
    means = [sum(told_apart(d, FRESH + n) for n in range(3)) / 3 for d in (4, 8, 16)]
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.3
