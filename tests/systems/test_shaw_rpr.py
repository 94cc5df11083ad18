"""S248, Shaw et al.: a learned vector for each clipped distance, in the logits and in the values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.previous import Previous
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import FRESH, below, dense, largest_temporary, qkv, stepwise, train

pytestmark = pytest.mark.system("S248")


def gathered(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, clip: int, exist: Tensor | None = None
) -> Tensor:
    """With explicit L x S x d tensors of table rows."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    rows, keys = q.shape[2], k.shape[2]
    at = (torch.arange(keys) - torch.arange(keys - rows, keys)[:, None]).clamp(-clip, clip) + clip
    s = (q[:, :, :, None] * (k[:, :, None] + a[at])).sum(-1) / q.shape[-1] ** 0.5
    w = torch.softmax(s if exist is None else s.masked_fill(~exist, -torch.inf), -1)
    return (w[..., None] * (v[:, :, None] + b[at])).sum(-2)


def tables(clip: int, d: int) -> list[Tensor]:
    return [torch.randn(2 * clip + 1, d, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize(("clip", "length", "keys"), [(1, 9, 9), (4, 33, 33), (60, 20, 20), (3, 5, 160)])
@pytest.mark.parametrize("text", ["shaw_rpr", "causal + shaw_rpr"])
def test_the_efficient_path_equals_the_gather_in_value_and_gradient(
    clip: int, length: int, keys: int, text: str
) -> None:
    tensors = [x.requires_grad_() for x in qkv(2, 4, length, 6, kv=2, keys=keys)]
    a, b = tables(clip, 6)
    exist = below(length, keys) if "causal" in text else None
    found = sc.attend(
        *tensors, text.replace("rpr", f"rpr({clip})"), params={"rel_table": a, "rel_value": b}, kernel="slab"
    )
    expected = gathered(*tensors, a, b, clip, exist)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(found)
    inputs = [*tensors, a, b]
    got = torch.autograd.grad((found * weight).sum(), inputs)
    for x, y in zip(got, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=0)


def test_zero_tables_are_plain_attention() -> None:
    q, k, v = qkv(2, 4, 21, 8, kv=2)
    zero = torch.zeros(9, 8, dtype=torch.float64)
    found = sc.attend(q, k, v, "shaw_rpr(4)", params={"rel_table": zero, "rel_value": zero})
    torch.testing.assert_close(found, dense(q, k, v), atol=1e-12, rtol=0)


def test_no_length_x_length_x_dim_tensor_is_made() -> None:
    q, k, v = qkv(1, 2, 1024, 64, dtype=torch.float32)
    params = {n: torch.randn(33, 64) for n in ("rel_table", "rel_value")}
    largest = largest_temporary(lambda: sc.attend(q, k, v, "shaw_rpr(16)", params=params))
    assert largest <= 2 * 128 * 1024 * 8


def test_both_tables_are_shared_by_the_heads() -> None:
    layer = sc.nn.Attention(32, 4, "shaw_rpr(5)")
    assert layer.rel_table.shape == (11, 8)
    assert layer.rel_value.shape == (11, 8)


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(16, 2, "causal + shaw_rpr(3)").double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)


def test_padding_is_not_read() -> None:
    layer, x = sc.nn.Attention(16, 2, "shaw_rpr(3)"), torch.randn(2, 12, 16)
    x[1, 7:] = torch.nan
    found = layer(x, key_lengths=torch.tensor([12, 7]))
    torch.testing.assert_close(found[1:, :7], layer(x[1:, :7]))


def shifted(mechanism: str, steps: int, seed: int = FRESH) -> float:
    """Accuracy of a one-layer model without absolute positions that writes the token 3 to the left."""
    torch.manual_seed(seed)
    task, generator = Previous(length=16, symbols=8, lag=3), torch.Generator().manual_seed(seed)
    model = sc.nn.Transformer(task.vocab, dim=32, depth=1, heads=2, mechanism=mechanism, positions="none")
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    tokens, targets = task.batch(256, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_it_writes_the_token_three_to_the_left_and_no_positions_do_not() -> None:
    assert shifted("shaw_rpr(4)", 250) >= 0.99
    assert shifted("causal", 250) <= 0.4
