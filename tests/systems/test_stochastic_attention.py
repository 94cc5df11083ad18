"""S298, stochastic attention: a window in shuffled order, gated with a plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.pattern import Permuted
from systems.helpers import dense, flops, qkv, stepwise

pytestmark = pytest.mark.system("S298")


def shuffled(q: Tensor, k: Tensor, v: Tensor, order: Tensor, half: int, causal: bool) -> Tensor:
    """Reorder, attend in a band, put back; later keys by the original positions are masked."""
    n = q.shape[2]
    at = torch.arange(n)
    band = (at[:, None] - at).abs() <= half
    if causal:
        band = band & (order[None] <= order[:, None])
    out = torch.empty_like(q)
    out[:, :, order] = dense(q[:, :, order], k[:, :, order], v[:, :, order], band)
    return out


@pytest.mark.parametrize("kernel", ["grid", "chunk", "slab", None])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "width"), [(60, 7), (150, 21), (40, 101)])
def test_every_path_equals_the_reordered_band_and_its_gradients(
    kernel: str | None, causal: bool, length: int, width: int
) -> None:
    leaves = [x.requires_grad_() for x in qkv(2, 4, length, 8, kv=2)]
    order = Permuted(width, length, 5).place(torch.arange(length)).argsort()
    text = f"{'causal + ' if causal else ''}permuted({width}, length={length}, seed=5)"
    found = sc.attend(*leaves, text, kernel=kernel)
    truth = shuffled(*leaves, order, width // 2, causal)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), leaves) for x in (found, truth)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_runs_of_one_token_leave_the_order_and_give_a_sliding_window() -> None:
    q, k, v = qkv(2, 2, 50, 8)
    found = sc.attend(q, k, v, "permuted(9, length=1)")
    torch.testing.assert_close(found, sc.attend(q, k, v, "neighborhood(9)"), atol=1e-12, rtol=0)
    half = sc.attend(q, k, v, "causal + permuted(9, length=1)")
    torch.testing.assert_close(half, sc.attend(q, k, v, "window(5)"), atol=1e-12, rtol=0)


def test_a_window_of_all_tokens_is_full_attention() -> None:
    q, k, v = qkv(2, 2, 50, 8)
    found = sc.attend(q, k, v, "permuted(101, length=50)")
    torch.testing.assert_close(found, dense(q, k, v), atol=1e-12, rtol=0)
    below = sc.attend(q, k, v, "causal + permuted(101, length=50)")
    torch.testing.assert_close(below, sc.attend(q, k, v, "causal"), atol=1e-12, rtol=0)


def test_the_gate_divides_one_between_the_two() -> None:
    q, k, v = qkv(2, 2, 40, 8)
    gate = torch.randn(2, 2, 40, dtype=torch.float64)
    m = "stochastic_attention(9, length=40, seed=2)"
    found = sc.attend(q, k, v, m, streams={"out_gate": gate})
    g = torch.sigmoid(gate).unsqueeze(-1)
    random, plain = (sc.attend(q, k, v, t) for t in ("causal + permuted(9, length=40, seed=2)", "window(9)"))
    torch.testing.assert_close(found, g * random + (1 - g) * plain, atol=1e-12, rtol=0)
    assert not sc.mechanism("stochastic_attention(causal=false)").causal


def test_decoding_equals_the_whole_call_beyond_one_run() -> None:
    layer = sc.nn.Attention(32, 4, "stochastic_attention(9, length=20)").double()
    x = torch.randn(2, 43, 32, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_three_layers_reach_almost_everything_and_a_window_does_not() -> None:
    layers = [f"permuted(17, length=1024, seed={n})" for n in range(4)]
    random = sc.receptive_field(layers, 1024).coverage
    window = sc.receptive_field("neighborhood(17)", 1024, layers=4).coverage
    assert random[2] >= 0.95
    assert random[3] > 0.999
    assert window[3] < 0.07
    assert random[0] < 0.02
    assert 0.15 < random[1] < 0.35


def test_one_order_for_all_layers_is_no_better_than_a_window() -> None:
    same = sc.receptive_field("permuted(17, length=1024)", 1024, layers=4).coverage
    window = sc.receptive_field("neighborhood(17)", 1024, layers=4).coverage
    assert same == pytest.approx(window)
    both = sc.receptive_field("stochastic_attention(17, length=1024, causal=false)", 1024, layers=4).coverage
    assert both[3] > 5 * window[3]


def test_under_a_causal_mask_half_of_the_edges_are_lost() -> None:
    layers = [f"causal + permuted(17, length=1024, seed={n})" for n in range(8)]
    found = sc.receptive_field(layers, 1024).coverage
    assert 0.4 < found[3] < 0.8
    assert found[7] < 0.97


def test_work_is_linear_in_the_tokens() -> None:
    counted = []
    for n in (1024, 4096):
        q, k, v = qkv(1, 2, n, 16, dtype=torch.float32)
        text = f"causal + permuted(65, length={n})"
        assert sc.plan(text, (1, 2, n, 16)).kernel in ("grid", "native")
        counted.append(flops(lambda q=q, k=k, v=v, text=text: sc.attend(q, k, v, text)))
    assert 3.5 < counted[1] / counted[0] < 4.5
