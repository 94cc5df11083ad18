"""Changes to weights against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

import saccade as sc


@pytest.mark.parametrize("half", [1, 5])
@pytest.mark.parametrize("text", ["gauss_gate", "causal + gauss_gate"])
def test_the_gaussian_gate_is_applied_after_softmax_and_not_renormalised(text: str, half: int) -> None:
    n, d = 6, 3
    q, k, v = torch.randn(3, 1, 2, n, d, dtype=torch.float64)
    centre = torch.rand(1, 2, n, dtype=torch.float64) * n
    m = sc.mechanism(text.replace("gauss_gate", f"gauss_gate({half})"))
    got = sc.reference.attend(q, k, v, m, streams={"centre": centre})
    short = False
    for h in range(2):
        for i in range(n):
            keys = range(i + 1 if m.causal else n)
            e = [
                math.exp(sum(q[0, h, i, c].item() * k[0, h, j, c].item() for c in range(d)) / math.sqrt(d))
                for j in keys
            ]
            p = centre[0, h, i].item()
            w = [e[j] / sum(e) * math.exp(-((j - p) ** 2) / (2 * (half / 2) ** 2)) for j in keys]
            short |= sum(w) < 0.9
            for c in range(d):
                want = sum(w[j] * v[0, h, j, c].item() for j in keys)
                assert got[0, h, i, c].item() == pytest.approx(want, abs=1e-12)
    assert short


def test_weights_shown_are_the_weights_used() -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    found = sc.attend(
        q,
        k,
        v,
        "causal + gauss_gate(2)",
        streams={"centre": torch.full((1, 2, 7), 3.3, dtype=torch.float64)},
        need=("weights",),
    )
    torch.testing.assert_close(found.weights @ v, found.out)
