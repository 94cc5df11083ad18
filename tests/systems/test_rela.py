"""S186, ReLA: weights that are exactly zero or grow with the score, and a gated norm after the mix."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.parts.base import Sizes
from saccade.tasks.copy import Copy
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import below, qkv, stepwise, train

HEADS, D = 2, 6
pytestmark = pytest.mark.system("S186")


def drawn() -> dict[str, Tensor]:
    """Weights of the mechanism, none of them at its starting value."""
    declared = sc.mechanism("rela").weights(Sizes(HEADS, HEADS, D, D))
    return {n: torch.randn(w.shape, dtype=torch.float64) for n, w in declared.items()}


def written_out(q: Tensor, k: Tensor, v: Tensor, params: dict[str, Tensor]) -> Tensor:
    """ReLA-g row by row, causal."""
    out = torch.zeros_like(v)
    for h in range(HEADS):
        gain, gate = params["gated_norm"][h], params["gated_norm_gate"][h]
        for i in range(q.shape[2]):
            z = torch.zeros(D, dtype=q.dtype)
            for j in range(i + 1):
                z = z + max(0.0, float(q[0, h, i] @ k[0, h, j]) / math.sqrt(D)) * v[0, h, j]
            rms = math.sqrt(float(z @ z) / D + 1e-6)
            out[0, h, i] = z / rms * gain * torch.sigmoid(gate * z)
    return out


@pytest.mark.parametrize("kernel", ["slab", "reference"])
def test_every_path_equals_the_formula(kernel: str) -> None:
    q, k, v = qkv(1, HEADS, 30, D)
    params = drawn()
    found = sc.attend(q, k, v, "causal + rela", params=params, kernel=kernel)
    torch.testing.assert_close(found, written_out(q, k, v, params), atol=1e-10, rtol=0)


def test_a_row_whose_scores_are_all_negative_attends_to_nothing_with_finite_gradients() -> None:
    q, k, v = qkv(2, HEADS, 9, D)
    k = k.abs()
    q = torch.cat((q[:, :, :4], -q[:, :, 4:].abs()), 2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    params = {n: x.requires_grad_() for n, x in drawn().items()}
    out = sc.attend(q, k, v, "rela", params=params)
    assert not out[:, :, 4:].any()
    assert out[:, :, :4].any()
    grads = torch.autograd.grad(out.sin().sum(), [*leaves, *params.values()])
    assert all(torch.isfinite(g).all() for g in grads)


def test_tiles_without_a_running_maximum_equal_the_dense_computation() -> None:
    q, k, v = qkv(1, HEADS, 700, 16, dtype=torch.float32)
    dense = torch.relu(q @ k.transpose(-1, -2) / 4).masked_fill(~below(700), 0) @ v
    rows = sc.attend(q, k, v, "causal + relu", kernel="slab")
    torch.testing.assert_close(rows, dense, atol=1e-5, rtol=1e-5)
    keys = sum(sc.attend(q, k[:, :, at : at + 64], v[:, :, at : at + 64], "relu") for at in range(0, 700, 64))
    torch.testing.assert_close(keys, torch.relu(q @ k.transpose(-1, -2) / 4) @ v, atol=1e-4, rtol=1e-5)


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(24, 4, "causal + rela").double()
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def backwards(mechanism: str, steps: int) -> tuple[float, float]:
    """Accuracy of a causal model that learned to write 16 symbols backwards, and the share of weights that are zero."""
    torch.manual_seed(0)
    task, generator = Copy(16, reverse=True), torch.Generator().manual_seed(0)
    model = sc.nn.Transformer(task.vocab, 32, depth=2, heads=2, mechanism=mechanism, max_length=task.width)
    for table in (model.embedding.tokens, model.embedding.positions):
        torch.nn.init.normal_(table.weight, std=0.3)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    tokens, targets = task.batch(256, torch.Generator().manual_seed(1))
    with torch.no_grad():
        x, shares = model.embedding(tokens), []
        for block in model.blocks:
            w = block.attention(block.norm1(x), need=("weights",)).weights
            shares.append(float((w[..., below(x.shape[1])] == 0).float().mean()))
            x = block(x)
        return accuracy(model(tokens), targets), sum(shares) / len(shares)


def test_strings_are_written_backwards_as_with_softmax_and_half_of_the_weights_are_zero() -> None:
    softmax, _ = backwards("causal", 300)
    rela, zeros = backwards("rela", 400)
    assert softmax >= 0.99
    assert rela >= softmax - 0.01
    assert zeros >= 0.5
