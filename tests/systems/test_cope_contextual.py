"""S143, contextual positions: distances that count the tokens which a gate of query and key lets through."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.flipflop import FlipFlop
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import FRESH, below, dense, qkv, stepwise, train

pytestmark = pytest.mark.system("S143")


def gated(strength: float, length: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v whose products all hold the same large number, and a table that does not see the channel it comes from."""
    q, k, v = qkv(2, 4, length, 8, kv=2)
    q[..., 0], k[..., 0] = 1.0, strength
    table = torch.randn(most + 1, 8, dtype=torch.float64)
    table[:, 0] = 0
    return q, k, v, table


@pytest.mark.parametrize("most", [3, 40])
def test_open_gates_give_exact_relative_positions(most: int) -> None:
    q, k, v, table = gated(1e4, 21, most)
    found = sc.attend(q, k, v, f"cope_contextual({most})", params={"context_count": table})
    distance = (torch.arange(21)[:, None] - torch.arange(21) + 1).clamp(0, most)
    terms = torch.einsum("bhid,ijd->bhij", q, table[distance]) / math.sqrt(8)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    s = q @ wide[0].mT / math.sqrt(8) + terms
    expected = torch.softmax(s.masked_fill(~below(21), -math.inf), -1) @ wide[1]
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


def test_it_is_then_the_relative_table_of_shaw() -> None:
    q, k, v, table = gated(1e4, 15, 20)
    shaw = torch.zeros(41, 8, dtype=torch.float64)
    shaw[1:21] = table[1:].flip(0)
    shaw[:21] = torch.stack([table[min(20, 1 - d)] for d in range(-20, 1)])
    torch.testing.assert_close(
        sc.attend(q, k, v, "cope_contextual(20)", params={"context_count": table}),
        sc.attend(q, k, v, "causal + rel_table(20)", params={"rel_table": shaw}),
        atol=1e-8,
        rtol=0,
    )


def test_closed_gates_give_one_shared_bias_and_so_no_position() -> None:
    q, k, v, table = gated(-1e4, 21, 5)
    found = sc.attend(q, k, v, "cope_contextual(5)", params={"context_count": table})
    torch.testing.assert_close(found, dense(q, k, v, below(21)), atol=1e-8, rtol=0)


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(16, 2, "cope_contextual(4)").double()
    torch.nn.init.normal_(layer.context_count)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)


def test_padding_is_not_counted() -> None:
    layer = sc.nn.Attention(16, 2, "cope_contextual(4)").double()
    torch.nn.init.normal_(layer.context_count)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    alone = layer(x[1:, :7])
    x[1, 7:] = math.nan
    found = layer(x, key_lengths=torch.tensor([12, 7]))
    torch.testing.assert_close(found[1:, :7], alone, atol=1e-12, rtol=0)


def errors(mechanism: str, steps: int = 450, seed: int = FRESH) -> list[float]:
    """Errors on flip-flops of 64, 128 and 256 tokens, trained on 64 after a start on 32."""
    torch.manual_seed(seed)
    easy, task, generator = FlipFlop(32, 0.6), FlipFlop(64), torch.Generator().manual_seed(seed)
    model = sc.nn.Transformer(5, dim=32, depth=2, heads=2, mechanism=mechanism, positions="none")
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = (easy if step < steps // 2 else task).batch(16, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    found = []
    for length in (64, 128, 256):
        tokens, targets = FlipFlop(length).batch(16384 // length, torch.Generator().manual_seed(seed + 1))
        with torch.no_grad():
            found.append(1 - accuracy(model(tokens), targets))
    return found


def test_flip_flops_at_the_trained_length_and_beyond() -> None:
    short, double, fourfold = errors("cope_contextual(8)")
    assert short <= 0.01
    assert double <= 0.05
    assert errors("causal + rope")[2] >= 2 * fourfold
