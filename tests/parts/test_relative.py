"""Terms by distance against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from parts import tools
from saccade.parts.relative import RelBias, RelTable, RelValue, T5Bias

B, H, G, L, S, D, E = 2, 4, 2, 7, 11, 6, 5


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(B, H, L, D, dtype=torch.float64),
        torch.randn(B, G, S, D, dtype=torch.float64),
        torch.randn(B, G, S, E, dtype=torch.float64),
    )


def t5_bucket(back: int, buckets: int, distance: int, two_sided: bool) -> int:
    """Raffel et al.: single distances, then the largest m whose power of the ratio is not above the distance."""
    first = 0
    if two_sided:
        buckets //= 2
        first = buckets if back < 0 else 0
    far = abs(back) if two_sided else max(back, 0)
    exact = max(1, buckets // 2)
    if far < exact:
        return first + far
    steps = buckets - exact
    m = max(m for m in range(steps + 1) if far**steps >= exact ** (steps - m) * distance**m)
    return first + min(exact + m, buckets - 1)


@pytest.mark.parametrize(
    ("buckets", "distance"), [(32, 128), (8, 20), (2, 5), (6, 1000), (32, 32 * 16), (4, 8)]
)
@pytest.mark.parametrize("two_sided", [False, True])
def test_t5_buckets(buckets: int, distance: int, two_sided: bool) -> None:
    part = T5Bias(buckets, distance, two_sided)
    back = torch.arange(-1100, 1101)
    want = [t5_bucket(int(x), buckets, distance, two_sided) for x in back]
    assert part.bucket(back).tolist() == want
    assert set(want) <= set(range(buckets))


def test_rel_bias_adds_the_number_of_head_and_clipped_distance() -> None:
    q, k, _ = tensors()
    table = torch.randn(H, 7, dtype=torch.float64)
    got = tools.logits(sc.Pairwise(logits=(RelBias(3),)), q, k, params={"rel_bias": table})
    plain = tools.logits(sc.Pairwise(), q, k)
    for h, i, j in itertools.product(range(H), range(L), range(S)):
        apart = max(-3, min(3, j - (i + S - L)))
        torch.testing.assert_close(got[:, h, i, j], plain[:, h, i, j] + table[h, apart + 3])


@pytest.mark.parametrize("two_sided", [False, True])
def test_t5_adds_the_number_of_head_and_bucket(two_sided: bool) -> None:
    q, k, _ = tensors()
    table = torch.randn(H, 8, dtype=torch.float64)
    m = sc.Pairwise(logits=(T5Bias(8, 9, two_sided),))
    got = tools.logits(m, q, k, params={"t5_bias": table})
    plain = tools.logits(sc.Pairwise(), q, k)
    for h, i, j in itertools.product(range(H), range(L), range(S)):
        bucket = t5_bucket(i + S - L - j, 8, 9, two_sided)
        torch.testing.assert_close(got[:, h, i, j], plain[:, h, i, j] + table[h, bucket])


@pytest.mark.parametrize("clip", [1, 3, 20])
def test_rel_table_and_value_by_loops(clip: int) -> None:
    q, k, v = tensors()
    a = torch.randn(2 * clip + 1, D, dtype=torch.float64)
    b = torch.randn(2 * clip + 1, E, dtype=torch.float64)
    m = sc.Pairwise(logits=(RelTable(clip),), value=(RelValue(clip),))
    got = sc.attend(q, k, v, m, params={"rel_table": a, "rel_value": b})
    for n, h, i in itertools.product(range(B), range(H), range(L)):
        g = h * G // H
        at = [max(-clip, min(clip, j - (i + S - L))) + clip for j in range(S)]
        e = [float(q[n, h, i] @ (k[n, g, j] + a[at[j]])) / math.sqrt(D) for j in range(S)]
        total = sum(map(math.exp, e))
        want = sum(math.exp(e[j]) / total * (v[n, g, j] + b[at[j]]) for j in range(S))
        torch.testing.assert_close(got[n, h, i], want)


def test_weights_are_added_up_by_distance() -> None:
    q, k, v = tensors()
    program = tools.bound(sc.mechanism("rel_value(2)"), q, k, v)  # type: ignore[arg-type]
    w = torch.rand(B, H, L, S, dtype=torch.float64)
    got = RelValue(2).by_distance(w, tools.tile(program))
    for i in range(L):
        want = torch.zeros(B, H, 5, dtype=torch.float64)
        for j in range(S):
            want[..., max(-2, min(2, j - (i + S - L))) + 2] += w[:, :, i, j]
        torch.testing.assert_close(got[:, :, i], want)


def test_a_tile_with_gaps_between_its_keys() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in range(3))
    params = {n: torch.randn(9, 8, dtype=torch.float64) for n in ("rel_table", "rel_value")}
    text = "causal + window(5) + sink(2) + rel_table(4) + rel_value(4)"
    got = sc.attend(q, k, v, text, params=params, kernel="slab")
    torch.testing.assert_close(got, sc.reference.attend(q, k, v, text, params=params))


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(sc.MechanismError, match="both sides share the buckets, give an even number, got 7"):
        T5Bias(7, two_sided=True)
    with pytest.raises(sc.MechanismError, match="distance must be above the 16 single distances, got 16"):
        T5Bias(32, 16)
    with pytest.raises(sc.MechanismError, match="clip must be a whole number of at least 1, got 0"):
        sc.mechanism("rel_table(0)")
    with pytest.raises(sc.MechanismError, match="rel_table needs bilinear, which additive breaks"):
        sc.mechanism("additive + rel_table")
