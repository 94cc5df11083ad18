"""S228, LightConv and DynamicConv: a depthwise convolution whose kernels are shares, learned or predicted by the token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.previous import Previous
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import largest_temporary, stepwise, train

pytestmark = pytest.mark.system("S228")


def values(batch: int = 2, heads: int = 4, length: int = 13, size: int = 3) -> Tensor:
    return torch.randn(batch, heads, length, size, dtype=torch.float64)


def unfolded(v: Tensor, logits: Tensor, before: int) -> Tensor:
    """The convolution row by row: logits (b, h, n, width), the first tap `before` tokens to the left."""
    b, h, n, e = v.shape
    rows = []
    for sample in range(b):
        for head in range(h):
            for i in range(n):
                total = sum(math.e**x for x in logits[sample, head, i])
                row = torch.zeros(e, dtype=v.dtype)
                for t, x in enumerate(logits[sample, head, i]):
                    if 0 <= i + t - before < n:
                        row = row + math.e**x / total * v[sample, head, i + t - before]
                rows.append(row)
    return torch.stack(rows).view(b, h, n, e)


@pytest.mark.parametrize(
    ("width", "causal", "before"), [(5, "false", 2), (5, "true", 4), (4, "true", 3), (1, "false", 0)]
)
def test_dynamic_kernels_by_loops_with_gradients(width: int, causal: str, before: int) -> None:
    v, taps = values().requires_grad_(), torch.randn(2, 4, 13, width, dtype=torch.float64).requires_grad_()
    found = sc.attend(v, v, v, f"dynamic_conv({width}, causal={causal})", streams={"taps": taps})
    expected = unfolded(v, taps, before)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), (v, taps)) for x in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("width", "causal"), [(5, "false"), (5, "true"), (6, "true"), (31, "true")])
def test_static_kernels_are_a_grouped_convolution(width: int, causal: str) -> None:
    v, taps = values(length=20), torch.randn(4, width, dtype=torch.float64)
    found = sc.attend(v, v, v, f"dynamic_conv({width}, taps=static, causal={causal})", params={"taps": taps})
    left = width - 1 if causal == "true" else width // 2
    channels = F.pad(v.transpose(2, 3).reshape(2, 12, 20), (left, width - 1 - left))
    kernel = torch.softmax(taps, -1).repeat_interleave(3, 0)[:, None]
    expected = F.conv1d(channels, kernel, groups=12).view(2, 4, 3, 20).transpose(2, 3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_one_kernel_serves_all_channels_of_a_head() -> None:
    layer = sc.nn.Attention(64, 4, "dynamic_conv(7, taps=static)")
    assert layer.taps.shape == (4, 7)
    assert layer.query_proj is None
    assert layer.key_proj is None


@pytest.mark.parametrize("taps", ["token", "static"])
def test_the_jacobian_is_zero_beyond_the_kernel(taps: str) -> None:
    def reads(text: str) -> Tensor:
        layer = sc.nn.Attention(8, 2, text).double()
        x = torch.randn(1, 12, 8, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, :, 0]
        return jacobian.abs().amax((1, 3)) > 0

    i, j = torch.arange(12)[:, None], torch.arange(12)
    assert torch.equal(reads(f"dynamic_conv(4, taps={taps}, causal=true)"), (j <= i) & (j > i - 4))
    assert torch.equal(reads(f"dynamic_conv(5, taps={taps})"), (i - j).abs() <= 2)


@pytest.mark.parametrize("taps", ["token", "static"])
def test_streaming_with_a_buffer_of_the_kernel_equals_the_whole(taps: str) -> None:
    layer = sc.nn.Attention(16, 4, f"dynamic_conv(5, taps={taps}, causal=true)").double()
    x = torch.randn(2, 60, 16, dtype=torch.float64)
    found, held = stepwise(layer, x)
    torch.testing.assert_close(found, layer(x), atol=1e-12, rtol=0)
    assert max(held) == max(held[:20]) <= 16 * 2 * 16 * 8
    block = sc.nn.GatedConv(16, 4, 5, taps=taps, causal=True).double()
    state, outs = block.init_state(2), []
    for piece in x.split([1, 1, 30, 2, 26], 1):
        out, state = block.step(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), block(x), atol=1e-12, rtol=0)


def test_the_block_is_a_gate_before_the_convolution() -> None:
    block = sc.nn.GatedConv(8, 2, 3).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    a, b = block.in_proj(x).chunk(2, -1)
    y = a * b.sigmoid()
    v, taps = (z.view(1, 7, 2, -1).transpose(1, 2) for z in (y, block.tap_proj(y)))
    expected = block.out_proj(unfolded(v, taps, 1).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_zero_and_never_read(causal: bool) -> None:
    block = sc.nn.GatedConv(8, 2, 5, causal=causal).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    poisoned = x.clone()
    poisoned[1, 7:] = math.nan
    found = block(poisoned, key_lengths=torch.tensor([12, 7]))
    torch.testing.assert_close(found[1:, :7], block(x[1:, :7]), atol=1e-12, rtol=0)


def test_the_last_queries_of_ragged_samples() -> None:
    v, taps, lengths = values(length=10), torch.randn(2, 4, 3, 4, dtype=torch.float64), torch.tensor([10, 6])
    found = sc.attend(
        v[:, :, :3], v, v, "dynamic_conv(4, causal=true)", streams={"taps": taps}, key_lengths=lengths
    )
    for b, n in enumerate(lengths.tolist()):
        whole = torch.zeros(1, 4, n, 4, dtype=torch.float64)
        whole[:, :, n - 3 :] = taps[b]
        expected = unfolded(v[b : b + 1, :, :n], whole, 3)[:, :, n - 3 :]
        torch.testing.assert_close(found[b : b + 1], expected, atol=1e-12, rtol=0)


def test_heads_of_a_convolution_stand_beside_heads_of_attention() -> None:
    layer = sc.nn.Attention(16, 4, "by_head(causal, dynamic_conv(3, taps=static, causal=true))").double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    q, k, v = layer.project(x)
    halves = (
        sc.attend(q[:, :2], k[:, :2], v[:, :2], "causal"),
        unfolded(v[:, 2:], layer.taps[2:, None].expand(2, 2, 11, 3), 2),
    )
    expected = layer.out_proj(torch.cat(halves, 1).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)


def test_work_and_memory_double_with_the_length() -> None:
    costs = []
    for n in (2048, 4096):
        v, taps = torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 7)
        cost = sc.plan("dynamic_conv", (1, 2, n, 16)).cost
        largest = largest_temporary(
            lambda v=v, taps=taps: sc.attend(v, v, v, "dynamic_conv", streams={"taps": taps})
        )
        costs.append((cost.bytes, cost.peak, largest))
    for small, large in zip(*costs, strict=True):
        assert large <= 2.3 * small


def test_what_it_cannot_do_is_refused() -> None:
    v = values()
    with pytest.raises(sc.MechanismError, match="odd number, got width 4; take an odd one or causal=true"):
        sc.mechanism("dynamic_conv(4)")
    with pytest.raises(sc.MechanismError, match="taps must be one of token, static"):
        sc.mechanism("dynamic_conv(5, taps=span)")
    with pytest.raises(sc.MechanismError, match="takes no parts beside it"):
        sc.mechanism("dynamic_conv(5) + rope")
    with pytest.raises(sc.NotSupported, match="use the same with causal=true"):
        sc.init_state("dynamic_conv(5)", 1, 4, 8)
    mask = torch.ones(1, 1, 13, 13, dtype=torch.bool)
    with pytest.raises(sc.NotSupported, match="no single pairs to mask"):
        sc.attend(v, v, v, "dynamic_conv(5, taps=static)", mask=mask, params={"taps": torch.zeros(4, 5)})
    with pytest.raises(ValueError, match=r"streams\['taps'\] must have shape \(2, 4, 13, 5\)"):
        sc.attend(v, v, v, "dynamic_conv(5)", streams={"taps": torch.zeros(2, 4, 13, 4)})
    with pytest.raises(ValueError, match="dim=9 must be a multiple of heads=2"):
        sc.nn.GatedConv(9, 2)
    assert str(sc.causal(sc.mechanism("dynamic_conv(5)"))) == "dynamic_conv(5, causal=true)"


def copied(taps: str, lag: int, steps: int = 100) -> float:
    """Accuracy of the token `lag` to the left, by two layers of width 5."""
    torch.manual_seed(0)
    task, generator = Previous(40, symbols=8, lag=lag), torch.Generator().manual_seed(0)
    text = f"dynamic_conv(5, taps={taps})"
    model = sc.nn.Transformer(task.vocab, dim=32, depth=2, heads=4, mechanism=text, positions="none")
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(16, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=1e-2)
    tokens, targets = task.batch(128, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


@pytest.mark.parametrize("taps", ["token", "static"])
def test_a_lag_within_the_kernel_is_copied_and_one_beyond_all_layers_is_not(taps: str) -> None:
    assert copied(taps, lag=4) >= 0.99
    assert copied(taps, lag=9) <= 1 / 8 + 0.05
