"""S210, Lightning attention: decayed linear attention in blocks, without a denominator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.kernels import recurrent
from saccade.mechanism.values import Recurrent
from saccade.systems import lightning
from systems.helpers import exponent, flops, qkv, stepwise

pytestmark = pytest.mark.system("S210")


def written_out(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, share: float = 1.0) -> Tensor:
    """((Q K^T) * D) V pair by pair, with D_ij = l^(i - j); then the norm of the whole token and its gate."""
    b, h, length, _ = q.shape
    g = k.shape[1]
    out = torch.zeros(b, h, length, v.shape[-1], dtype=q.dtype)
    for n in range(b):
        for head in range(h):
            group = head * g // h
            keep = math.exp(-share * 2 ** (-8 * (group + 1) / g))
            for i in range(length):
                rows = [
                    keep ** (i - j) * (q[n, head, i] @ k[n, group, j]) * v[n, group, j] for j in range(i + 1)
                ]
                out[n, head, i] = torch.stack(rows).sum(0)
    norm = torch.sqrt((out**2).mean((1, 3), keepdim=True) + 1e-6)
    return out / norm / (1 + torch.exp(-gate))


def drawn(
    length: int, kv: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Tensor]]:
    x = list(qkv(2, 4, length, 6, kv=kv, dtype=dtype))
    return x, {"channel_gate": torch.randn(2, 4, length, 6, dtype=dtype)}


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("kv", [2, 4])
def test_equals_the_dense_decayed_product_and_its_gradients(kv: int, share: float) -> None:
    x, streams = drawn(21, kv)
    leaves = [t.requires_grad_() for t in (*x, *streams.values())]
    text = f"lightning_attention_tnl({share})"
    found = sc.attend(*x, text, streams=streams, kernel="recurrent")
    expected = written_out(*x, streams["channel_gate"], share)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(y.sin().sum(), leaves) for y in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize("block", [1, 7, 64, 100])
def test_blocks_of_any_size_give_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens, which 7 and 64 do not divide."""
    x, streams = drawn(100)
    leaves = [t.requires_grad_() for t in (*x, *streams.values())]

    def answers() -> list[Tensor]:
        out = sc.attend(*x, "lightning_attention_tnl", streams=streams, kernel="recurrent")
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    whole = answers()
    monkeypatch.setattr(recurrent, "chunk_length", lambda m, device: block)
    for got, wanted in zip(answers(), whole, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


def test_the_step_recurrence_gives_the_same_and_keeps_one_matrix_a_head() -> None:
    layer = sc.nn.Attention(32, 4, "lightning_attention_tnl").double()
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    found, held = stepwise(layer, x)
    torch.testing.assert_close(found, layer(x), atol=1e-12, rtol=0)
    assert held == [2 * 4 * (8 * 8 + 8 + 1) * 8] * 40


def test_strong_decay_over_long_texts_stays_finite_in_float32() -> None:
    """Heads of slope 1/4 keep e^-1000 of a token after 4,000: powers of l below zero would overflow."""
    x, streams = drawn(4000, dtype=torch.float32)
    found = sc.attend(*x, "lightning_attention_tnl", streams=streams, kernel="recurrent")
    wide = sc.attend(
        *(t.double() for t in x),
        "lightning_attention_tnl",
        streams={n: t.double() for n, t in streams.items()},
        kernel="recurrent",
    )
    torch.testing.assert_close(found.double(), wide, atol=1e-5, rtol=1e-4)


def test_bfloat16_stays_near() -> None:
    x, streams = drawn(150, kv=2, dtype=torch.bfloat16)
    found = sc.attend(*x, "lightning_attention_tnl", streams=streams)
    assert found.dtype == torch.bfloat16
    wide = {n: t.double() for n, t in streams.items()}
    wanted = sc.attend(*(t.double() for t in x), "lightning_attention_tnl", streams=wide)
    assert (found.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_work_grows_with_the_length_and_the_state_does_not() -> None:
    def cost(n: int) -> int:
        x, streams = (torch.zeros(1, 4, n, 16) for _ in range(3)), {"channel_gate": torch.zeros(1, 4, n, 16)}
        done = flops(lambda: sc.attend(*x, "lightning_attention_tnl", streams=streams, kernel="recurrent"))
        planned = sc.plan("lightning_attention_tnl", (1, 4, n, 16), kernel="recurrent").cost.flops
        assert abs(done / planned - 1) < 0.03
        return done

    lengths = [2048, 4096, 8192, 16384]
    assert exponent(lengths, [float(cost(n)) for n in lengths]) <= 1.02


def test_layers_forget_less_and_less_and_decode() -> None:
    texts = lightning.layers(3)
    assert texts == (
        "lightning_attention_tnl(1)",
        "lightning_attention_tnl(0.5)",
        "lightning_attention_tnl(0)",
    )
    assert lightning.layers(1) == ("lightning_attention_tnl(1)",)
    model = sc.nn.Transformer(7, 16, 3, 2, mechanism=texts, positions="none").double()
    tokens = torch.randint(7, (2, 20))
    states, rows = model.init_state(2), []
    for t in range(20):
        logits, states = model.step(tokens[:, t : t + 1], states)
        rows.append(logits)
    torch.testing.assert_close(torch.cat(rows, 1), model(tokens), atol=1e-10, rtol=0)
    with pytest.raises(sc.MechanismError, match="depth must be at least 1, got 0"):
        lightning.layers(0)


@pytest.mark.parametrize(
    "text", ["slope_decay(-0.1)", "fixed_decay(0)", "fixed_decay(-2)", "gate_decay(0)", "channel_decay(-1)"]
)
def test_decays_above_one_are_refused(text: str) -> None:
    with pytest.raises(sc.MechanismError, match=r"must be a number (of at least 0|above 0)"):
        sc.mechanism(f"causal + identity + {text}")


@pytest.mark.parametrize(
    "text", ["gate_decay", "channel_decay", "step_decay", "fixed_decay(60)", "slope_decay"]
)
def test_decays_lie_in_zero_to_one_whatever_is_predicted(text: str) -> None:
    m = sc.mechanism(f"causal + identity + {text}")
    assert isinstance(m, Recurrent)
    assert m.decay is not None
    q, k, v = qkv(1, 2, 5, 4)
    c = sc.reference.context(q, k, v)
    sizes = c.sizes
    for size in (-1e4, 0.0, 1e4):
        c.streams.update(
            {n: torch.full(s.shape(1, 2, 5), size).double() for n, s in m.streams(sizes).items()}
        )
        c.params.update({n: torch.ones(w.shape) for n, w in m.weights(sizes).items()})
        log = m.decay.log(c)
        assert bool(torch.isfinite(log).all())
        assert float(log.max()) <= 0
        out = sc.attend(q, k, v, m, streams=c.streams, params=c.params)
        assert bool(torch.isfinite(out).all())
