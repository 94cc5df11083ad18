"""Stretched and axial rotations against complex numbers, one token and pair at a time."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.pair import Context
from saccade.parts.rotary import AxialRope, RopeLinear, RopeNtk, RopeYarn
from saccade.parts.tokens import Rope, Rotary

D = 16


def mapped(part: Rotary, x: Tensor, positions: Tensor) -> Tensor:
    return part.map(x, positions, "q", Context(x, x, x))


def turned(x: Tensor, positions: Tensor, angle: Callable[[int, int], float], stretch: float = 1.0) -> Tensor:
    """Every pair (x_m, x_{m + d/2}) as a complex number, turned by angle(position, m)."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for b, h, n, m in torch.cartesian_prod(*(torch.arange(s) for s in (*x.shape[:3], half))).tolist():
        at = int(positions[b % len(positions), n])
        z = stretch * complex(x[b, h, n, m], x[b, h, n, m + half]) * cmath.exp(1j * angle(at, m))
        out[b, h, n, m], out[b, h, n, m + half] = z.real, z.imag
    return out


def yarn_rate(m: int, factor: float, length: int, slow: float, fast: float, base: float) -> float:
    rate = base ** (-2 * m / D)
    turns = length / (2 * math.pi / rate)
    share = 0.0 if turns < slow else 1.0 if turns > fast else (turns - slow) / (fast - slow)
    return (1 - share) * rate / factor + share * rate


@pytest.mark.parametrize(
    ("part", "angle", "stretch"),
    [
        (RopeLinear(4.0), lambda p, m: p / 4 * 10000 ** (-2 * m / D), 1.0),
        (RopeLinear(2.5, base=50.0), lambda p, m: p / 2.5 * 50 ** (-2 * m / D), 1.0),
        (RopeNtk(8.0), lambda p, m: p * (10000 * 8 ** (D / (D - 2))) ** (-2 * m / D), 1.0),
        (RopeYarn(4.0, length=256), lambda p, m: p * yarn_rate(m, 4, 256, 1, 32, 1e4), 1 + 0.1 * math.log(4)),
        (
            RopeYarn(3.0, length=64, base=100.0, slow=2.0, fast=8.0),
            lambda p, m: p * yarn_rate(m, 3, 64, 2, 8, 100),
            1 + 0.1 * math.log(3),
        ),
    ],
)
def test_each_pair_turns_by_its_scaled_angle(
    part: Rotary, angle: Callable[[int, int], float], stretch: float
) -> None:
    x = torch.randn(2, 2, 4, D, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3], [5, 77, 500, 4096]])
    torch.testing.assert_close(
        mapped(part, x, positions), turned(x, positions, angle, stretch), atol=1e-10, rtol=0
    )


def test_yarn_uses_all_three_bands() -> None:
    rates = RopeYarn(4.0, length=256).rates(D, torch.device("cpu")) / Rope().rates(D, torch.device("cpu"))
    assert rates[0] == 1
    assert bool((rates[-2:] == 0.25).all())
    assert bool(((rates > 0.25) & (rates < 1)).any())


@pytest.mark.parametrize("text", ["rope_linear(1)", "rope_ntk(1)", "rope_yarn(1)"])
def test_a_factor_of_one_is_plain_rope(text: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 20, D, dtype=torch.float64)
    want = sc.attend(q, k, v, "causal + rope")
    torch.testing.assert_close(sc.attend(q, k, v, f"causal + {text}"), want, atol=1e-12, rtol=0)


def test_yarn_divides_the_temperature_of_the_logits() -> None:
    q, k = torch.randn(2, 1, 1, 1, D, dtype=torch.float64)
    at = torch.zeros(1, 1)
    part = RopeYarn(16.0)
    product = float((mapped(part, q, at) * mapped(part, k, at)).sum())
    assert product == pytest.approx(float((q * k).sum()) * (1 + 0.1 * math.log(16)) ** 2)


@pytest.mark.parametrize("grid", [(3, 4), (2, 3, 2), (12,)])
def test_axial_turns_each_share_of_the_pairs_by_its_own_coordinate(grid: tuple[int, ...]) -> None:
    d, axes = 24, len(grid)
    x = torch.randn(1, 2, 12, d, dtype=torch.float64)
    share = d // 2 // axes

    def angle(position: int, m: int) -> float:
        axis, within = divmod(m, share)
        coordinate = position // math.prod(grid[axis + 1 :]) % grid[axis]
        return coordinate * 100.0 ** (-within / share)

    positions = torch.arange(12)[None]
    got = mapped(AxialRope(grid=grid), x, positions)
    torch.testing.assert_close(got, turned(x, positions, angle), atol=1e-12, rtol=0)


def test_axial_products_depend_on_the_offset_along_each_axis() -> None:
    q, k = torch.randn(2, 1, 1, 1, D, dtype=torch.float64)
    part = AxialRope(grid=(8, 8))

    def product(i: tuple[int, int], j: tuple[int, int]) -> float:
        a, b = (mapped(part, x, torch.tensor([[8 * p[0] + p[1]]])) for x, p in ((q, i), (k, j)))
        return float((a * b).sum())

    assert product((3, 5), (1, 2)) == pytest.approx(product((6, 3), (4, 0)), abs=1e-12)
    assert abs(product((3, 5), (1, 2)) - product((5, 3), (2, 1))) > 1e-3


def test_axial_takes_the_grid_of_the_call() -> None:
    q, k, v = torch.randn(3, 1, 2, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(
        sc.attend(q, k, v, "axial_rope", grid=(3, 4)), sc.attend(q, k, v, "axial_rope(grid=(3, 4))")
    )
    assert not torch.allclose(
        sc.attend(q, k, v, "axial_rope", grid=(3, 4)), sc.attend(q, k, v, "axial_rope", grid=(4, 3))
    )


def test_gradients_of_a_turn_and_of_its_gradient() -> None:
    x = torch.randn(2, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([[0, 5, 9]])
    assert torch.autograd.gradcheck(lambda y: mapped(RopeYarn(4.0, length=32), y, at), (x,))
    assert torch.autograd.gradgradcheck(lambda y: mapped(Rope(), y, at).sin(), (x,))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rope_linear(0.5)", "factor must be a number of at least 1, got 0.5"),
        ("rope_ntk", "factor"),
        ("rope_yarn(2, length=0)", "length must be a whole number of at least 1"),
        ("rope_yarn(2, slow=4, fast=4)", "fast must be above slow=4, got 4"),
        ("axial_rope(grid=(4, 0))", "each of grid must be a whole number of at least 1, got 0"),
        ("axial_rope(grid=(4, 2.5))", "each of grid must be a whole number"),
    ],
)
def test_bad_parameters_are_refused(text: str, why: str) -> None:
    with pytest.raises(sc.MechanismError, match=why.replace("(", r"\(")):
        sc.mechanism(text)


def test_sizes_that_do_not_divide_are_refused() -> None:
    q = torch.randn(1, 2, 12, 10)
    with pytest.raises(sc.NotSupported, match="a multiple of 4, got 10"):
        sc.attend(q, q, q, "axial_rope", grid=(3, 4))
    with pytest.raises(sc.NotSupported, match=r"grid=\(h, w\)"):
        sc.attend(q, q, q, "axial_rope")
    with pytest.raises(sc.NotSupported, match="at least 4, got 2"):
        sc.attend(*torch.randn(3, 1, 1, 4, 2), "rope_ntk(2)")
    with pytest.raises(sc.NotSupported, match="rope_linear turns pairs of channels: head_dim must be even"):
        sc.attend(*torch.randn(3, 1, 1, 4, 3), "rope_linear(2)")
