"""Token maps against plain loops."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import saccade as sc
from saccade.parts.pair import Context
from saccade.parts.tokens import Rope, Standardize, TokenMap, near_turns, turn_table


def mapped(part: TokenMap, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return part.map(x, positions, "q", Context(x, x, x))


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_rope_turns_each_channel_pair_by_its_angle(base: float) -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 1000]])
    got = mapped(Rope(base), x, positions)
    for b in range(2):
        for h in range(3):
            for n in range(5):
                for m in range(4):
                    angle = positions[b, n].item() * base ** (-2 * m / 8)
                    turned = complex(x[b, h, n, m], x[b, h, n, m + 4]) * cmath.exp(1j * angle)
                    assert got[b, h, n, m].item() == pytest.approx(turned.real, abs=1e-12)
                    assert got[b, h, n, m + 4].item() == pytest.approx(turned.imag, abs=1e-12)


def test_rope_makes_products_a_function_of_distance() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    part = Rope()

    def product(i: int, j: int) -> float:
        return float((mapped(part, q, torch.tensor([[i]])) * mapped(part, k, torch.tensor([[j]]))).sum())

    for distance in (0, 3, 50):
        found = [product(j + distance, j) for j in (0, 1, 17, 5000)]
        assert found == pytest.approx([found[0]] * 4, abs=1e-11)
    assert abs(product(3, 0) - product(0, 3)) > 1e-6
    assert product(0, 0) == pytest.approx(float((q * k).sum()))


def test_rope_keeps_lengths_and_the_first_token() -> None:
    x = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    got = mapped(Rope(), x, torch.arange(6)[None])
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(got[:, :, 0], x[:, :, 0])


def test_rope_angles_stay_exact_at_far_positions_in_low_precision() -> None:
    x = torch.randn(1, 1, 1, 64)
    far = torch.tensor([[1 << 20]])
    want = mapped(Rope(), x.double(), far)
    for dtype in (torch.float32, torch.bfloat16):
        got = mapped(Rope(), x.to(dtype), far)
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * x.abs().max()


def test_rope_needs_even_heads() -> None:
    with pytest.raises(sc.NotSupported, match="head_dim must be even, got 7"):
        sc.attend(*torch.randn(3, 1, 2, 4, 7), "rope")


def test_standardize() -> None:
    x = 3 * torch.randn(2, 2, 3, 5, dtype=torch.float64) + 1
    got = mapped(Standardize(eps=1e-3), x, torch.arange(3)[None])
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        row = x[tuple(index)].tolist()
        mean = sum(row) / 5
        variance = sum((r - mean) ** 2 for r in row) / 5
        for c in range(5):
            want = (row[c] - mean) / math.sqrt(variance + 1e-3)
            assert got[(*index, c)].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_kept_table_of_turns_changes_no_bit(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 40, 8).to(dtype)
    for first in (0, 1, 7, 100, 5000):
        at = first + torch.arange(40)
        each = [mapped(Rope(), x[:, :, n : n + 1], at[n].view(1, 1).double()) for n in range(40)]
        assert torch.equal(mapped(Rope(), x, at[None]), torch.cat(each, 2))


def test_tables_are_few_and_made_for_near_positions_on_the_cpu_alone() -> None:
    x = torch.randn(1, 1, 2, 8)
    turn_table.cache_clear()
    for at in ([[0, 2]], [[-1, 0]], [[0, 1], [4, 5]], [[1 << 20, (1 << 20) + 1]]):
        assert near_turns(Rope(), torch.tensor(at), 8, torch.float32) is None
    assert near_turns(Rope(), torch.arange(2, device="meta")[None], 8, torch.float32) is None
    assert turn_table.cache_info().currsize == 0
    for base in range(1, 20):
        mapped(Rope(float(base)), x, torch.tensor([[100, 101]]))
    assert turn_table.cache_info().currsize == turn_table.cache_info().maxsize == 4
    assert mapped(Rope(), torch.randn(1, 1, 0, 8), torch.zeros(1, 0, dtype=torch.long)).shape == (1, 1, 0, 8)


def test_a_table_made_in_inference_mode_serves_training() -> None:
    x = torch.randn(1, 2, 6, 8, requires_grad=True)
    turn_table.cache_clear()
    with torch.inference_mode():
        want = mapped(Rope(), x, torch.arange(6)[None]).clone()
    got = mapped(Rope(), x, torch.arange(6)[None])
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got.square().sum() / 2, x)
    torch.testing.assert_close(grad, x.detach())


def test_tracing_and_fake_tensors_leave_no_table_behind() -> None:
    turn_table.cache_clear()
    with FakeTensorMode():
        x = torch.randn(1, 2, 6, 8)
        assert mapped(Rope(), x, torch.arange(6)[None]).shape == (1, 2, 6, 8)
    assert turn_table.cache_info().currsize == 0
