"""S135, memory-efficient attention: the same result in tiles with a running maximum and sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade as sc
from systems.helpers import below, dense, largest_temporary, qkv

pytestmark = pytest.mark.system("S135")


def grads(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.sin().sum(), (q, k, v))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    keys=st.integers(1, 40),
    query_chunk=st.integers(1, 50),
    key_chunk=st.integers(1, 50),
    causal=st.booleans(),
)
def test_any_chunk_sizes_give_dense_softmax_and_its_gradients(
    rows: int, keys: int, query_chunk: int, key_chunk: int, causal: bool
) -> None:
    rows = min(rows, keys) if causal else rows
    q, k, v = (x.requires_grad_() for x in qkv(2, 2, rows, 5, keys=keys))
    text = f"memory_efficient_attention({query_chunk}, key_chunk={key_chunk})"
    found = sc.attend(q, k, v, f"causal + {text}" if causal else text)
    expected = dense(q, k, v, below(rows, keys) if causal else None)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    for mine, theirs in zip(grads(q, k, v, found), grads(q, k, v, expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunks", [(1, 1), (7, 3), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_and_padding(chunks: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(3, 2, 23, 8, dtype=dtype))
    text = f"memory_efficient_attention({chunks[0]}, key_chunk={chunks[1]})"
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    mask = torch.rand(3, 2, 23, 23) < 0.5
    mask |= torch.eye(23, dtype=torch.bool)
    lengths = torch.tensor([23, 9, 1])
    padded = (torch.arange(23) < lengths[:, None])[:, None, None]
    for found, exist in (
        (sc.attend(q, k, v, text, mask=mask), mask),
        (sc.attend(q, k, v, text, key_lengths=lengths), padded),
    ):
        expected = dense(q, k, v, exist)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        for mine, theirs in zip(grads(q, k, v, found), grads(q, k, v, expected), strict=True):
            torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


def test_a_row_without_keys_gives_zeros() -> None:
    q, k, v = qkv(1, 1, 6, 4)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2, :] = False
    found = sc.attend(q, k, v, "memory_efficient_attention(2, key_chunk=2)", mask=mask, need=("out", "lse"))
    assert (found.out[:, :, 2] == 0).all()
    assert torch.isneginf(found.lse[:, :, 2]).all()
    assert found.out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_do_not_overflow(dtype: torch.dtype, size: float) -> None:
    """A float32 logit of 10^4 is itself rounded to 10^-3, which no float32 softmax, dense or tiled, can undo."""
    q, k, v = qkv(1, 2, 64, 16)
    q = q * (size / (q @ k.transpose(-1, -2) / 4).abs().max())
    low = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    found = sc.attend(*low, "memory_efficient_attention(16, key_chunk=8)")
    assert all(g.isfinite().all() for g in grads(*low, found))
    rounding = size * torch.finfo(dtype).eps * v.abs().max()
    assert (found.double() - dense(q, k, v)).abs().max() <= rounding
    assert rounding < 1e-10 or dtype == torch.float32
    naive = torch.exp(low[0] @ low[1].transpose(-1, -2) / 4)
    assert naive.isinf().any() or size < 1e4


@pytest.mark.parametrize("grad", [False, True])
def test_the_largest_temporary_is_ten_times_smaller_than_that_of_the_dense_form(grad: bool) -> None:
    q, k, v = (x.requires_grad_(grad) for x in qkv(1, 1, 4096, 16, dtype=torch.float32))

    def run(form: str) -> None:
        out = dense(q, k, v) if form == "dense" else sc.attend(q, k, v, form)
        if grad:
            out.sum().backward()

    whole = largest_temporary(lambda: run("dense"))
    tiled = largest_temporary(lambda: run("memory_efficient_attention"))
    square_root = largest_temporary(lambda: run("memory_efficient_attention(64, key_chunk=64)"))
    assert whole >= 4096 * 4096 * 4
    assert 10 * tiled <= whole
    assert square_root <= tiled


def test_the_plan_promises_memory_that_grows_with_length_alone() -> None:
    peaks = [sc.plan("memory_efficient_attention", (1, 8, n, 64)).cost.peak for n in (4096, 8192, 16384)]
    assert peaks[1] <= 2.1 * peaks[0]
    assert peaks[2] <= 2.1 * peaks[1]


@pytest.mark.parametrize("pieces", [2, 5, 32])
def test_partial_results_over_pieces_of_the_keys_merge_to_the_whole(pieces: int) -> None:
    q, k, v = qkv(2, 2, 9, 8, keys=32)
    parts = []
    for at in torch.arange(32).tensor_split(pieces):
        part = sc.attend(
            q, k[:, :, at], v[:, :, at], "memory_efficient_attention(4, key_chunk=3)", need=("out", "lse")
        )
        parts.append((part.out, part.lse))
    order = torch.randperm(pieces).tolist()
    out, lse = sc.merge([parts[n] for n in order])
    torch.testing.assert_close(out, dense(q, k, v), atol=1e-12, rtol=0)
    expected = torch.logsumexp(q @ k.transpose(-1, -2) / 8**0.5, -1)
    torch.testing.assert_close(lse, expected, atol=1e-12, rtol=0)
