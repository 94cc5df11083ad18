"""S151, KV-shifting: each key and value mixed with its predecessor, so that one layer can do induction."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.induction import Induction
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import below, dense, qkv, stepwise, train

pytestmark = pytest.mark.system("S151")


def taps(kv: int) -> dict[str, Tensor]:
    return {n: torch.rand(kv, 2, dtype=torch.float64) for n in ("shift_k", "shift_v")}


def written_out(q: Tensor, k: Tensor, v: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Row by row, with keys and values shifted one at a time."""
    b, h, length, d = q.shape
    rows = []
    for n in range(b):
        for head in range(h):
            g = head * k.shape[1] // h
            (a1, a2), (b1, b2) = params["shift_k"][g], params["shift_v"][g]
            keys, values = [a1 * k[n, g, 0]], [b1 * v[n, g, 0]]
            for i in range(1, length):
                keys.append(a1 * k[n, g, i] + a2 * k[n, g, i - 1])
                values.append(b1 * v[n, g, i] + b2 * v[n, g, i - 1])
            for i in range(length):
                s = torch.stack([q[n, head, i] @ keys[j] / math.sqrt(d) for j in range(i + 1)])
                w = torch.softmax(s, 0)
                rows.append(torch.stack([w[j] * values[j] for j in range(i + 1)]).sum(0))
    return torch.stack(rows).view(b, h, length, -1)


@pytest.mark.parametrize("kernel", ["sdpa", "chunk", "slab", None])
def test_the_formula_and_its_gradients(kernel: str | None) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 9, 6, kv=2))
    params = {n: x.requires_grad_() for n, x in taps(2).items()}
    found = sc.attend(q, k, v, "gqa(2) + kv_shifting", params=params, kernel=kernel)
    expected = written_out(q, k, v, params)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    leaves = [q, k, v, *params.values()]
    grads = [torch.autograd.grad(x.sin().sum(), leaves) for x in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


def test_taps_of_one_and_zero_are_standard_attention_exactly() -> None:
    q, k, v = qkv(2, 4, 33, 8)
    one = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(4, 2)
    found = sc.attend(q, k, v, "kv_shifting", params={"shift_k": one, "shift_v": one})
    assert torch.equal(found, sc.attend(q, k, v, "causal"))
    torch.testing.assert_close(found, dense(q, k, v, below(33)), atol=1e-12, rtol=0)


def test_taps_start_as_a_share_and_the_rest_of_one() -> None:
    layer = sc.nn.Attention(64, 64, "kv_shifting", generator=torch.Generator().manual_seed(0))
    for x in (layer.shift_k.detach(), layer.shift_v.detach()):
        torch.testing.assert_close(x.sum(-1), torch.ones(64))
        assert x.min() >= 0
        assert 0.4 < x[:, 0].mean() < 0.6
        assert x[:, 0].std() > 0.2
    assert not torch.equal(layer.shift_k, layer.shift_v)
    assert sum(x.numel() for n, x in layer.named_parameters() if "shift" in n) == 4 * 64


@pytest.mark.parametrize(
    "text",
    [
        "kv_shifting",
        "gqa(2) + kv_shifting + rope",
        "kv_shift + window(5)",
        "kv_shift + causal + linear",
        "learned_query + causal + kv_shift",
        "by_head(kv_shifting, window(4))",
    ],
)
def test_decoding_equals_the_whole_call(text: str) -> None:
    layer = sc.nn.Attention(32, 4, text).double()
    x = torch.randn(2, 43, 32, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)
    state, outs = layer.init_state(2), []
    for piece in x.split([7, 1, 20, 15], 1):
        out, state = layer.step(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), atol=1e-12, rtol=0)


def test_the_cache_holds_one_more_row_of_keys_and_values() -> None:
    x = torch.randn(1, 10, 32)
    held = [stepwise(sc.nn.Attention(32, 4, text), x)[1] for text in ("kv_shifting", "causal")]
    assert [a - b for a, b in zip(*held, strict=True)] == [2 * 32 * 4] * 10


def test_two_continuations_of_one_state_do_not_disturb_each_other() -> None:
    layer = sc.nn.Attention(16, 2, "kv_shifting").double()
    start, a, b = (torch.randn(1, n, 16, dtype=torch.float64) for n in (5, 3, 3))
    _, root = layer.step(start, layer.init_state(1))
    first, _ = layer.step(a, root)
    second, _ = layer.step(b, root)
    torch.testing.assert_close(first, layer(torch.cat((start, a), 1))[:, 5:], atol=1e-12, rtol=0)
    torch.testing.assert_close(second, layer(torch.cat((start, b), 1))[:, 5:], atol=1e-12, rtol=0)


def test_the_shift_stands_where_the_text_puts_it() -> None:
    """Shifted keys that are then rotated differ from rotated keys that are then shifted."""
    q, k, v = qkv(1, 2, 12, 8)
    before, after = (
        sc.attend(q, k, v, text, params=taps(2))
        for text in ("kv_shifting + rope", "causal + rope + kv_shift")
    )
    assert (before - after).abs().max() > 1e-3


def test_padding_reaches_neither_outputs_nor_the_gradients_of_the_taps() -> None:
    q, k, v = qkv(2, 2, 12, 8)
    k[1, :, 7:], v[1, :, 7:] = math.nan, math.nan
    params = {n: x.requires_grad_() for n, x in taps(2).items()}
    found = sc.attend(q, k, v, "kv_shifting", key_lengths=torch.tensor([12, 7]), params=params)
    alone = sc.attend(*(x[1:, :, :7] for x in (q, k, v)), "kv_shifting", params=params)
    torch.testing.assert_close(found[1:, :, :7], alone, atol=1e-12, rtol=0)
    grads = torch.autograd.grad(found.sum(), list(params.values()))
    assert all(bool(torch.isfinite(g).all()) for g in grads)


def test_a_state_of_plain_attention_and_wrong_taps_are_refused() -> None:
    q, k, v = qkv(1, 2, 1, 8)
    plain = sc.init_state("causal", 1, 2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"should hold .*kv_shift_k"):
        sc.attend(q, k, v, "kv_shifting", params=taps(2), state=plain)
    with pytest.raises(ValueError, match=r"shift_k.* must have shape \(2, 2\), got \(1, 2\)"):
        sc.attend(q, k, v, "kv_shifting", params=taps(1))


def induced(mechanism: str, steps: int = 250) -> float:
    """Next-token accuracy of a one-layer model in the second copy of a random string."""
    torch.manual_seed(0)
    task, generator = Induction(24, symbols=16, repeated=True), torch.Generator().manual_seed(0)
    model = sc.nn.Transformer(task.vocab, dim=32, depth=1, heads=2, mechanism=mechanism, positions="none")
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    tokens, targets = task.batch(256, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_one_layer_does_induction_and_a_plain_one_does_not() -> None:
    assert induced("kv_shifting") >= 0.9
    assert induced("causal") <= 0.3
