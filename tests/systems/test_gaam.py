"""S281, GAAM: a gate of Gaussians around the mean tells shapes of distributions apart that pooled moments cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from systems.helpers import train

pytestmark = pytest.mark.system("S281")
LENGTH, DIM = 64, 16


def test_weights_do_not_see_a_constant() -> None:
    gate = sc.nn.GaussianGate(8, gaussians=2, heads=4)
    x = torch.randn(4, 30, 8)
    torch.testing.assert_close(gate.weights(x + 1.5), gate.weights(x), atol=1e-6, rtol=0)
    gate = gate.double()
    torch.testing.assert_close(gate.weights(x.double() - 100), gate.weights(x.double()), atol=1e-12, rtol=0)


def test_wide_gaussians_weigh_all_tokens_alike() -> None:
    gate = sc.nn.GaussianGate(8, gaussians=2, heads=4)
    x = torch.randn(4, 30, 8)
    gaps = []
    for c in (1.0, 10.0, 100.0, 1e4):
        nn.init.constant_(gate.c, c)
        gaps.append(float((gate.weights(x) * 30 - 1).detach().abs().max()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1
    assert gaps[-1] < 1e-6


def test_the_sign_of_a_width_does_not_matter() -> None:
    gate = sc.nn.GaussianGate(8, gaussians=2, heads=4)
    x = torch.randn(4, 30, 8)
    before = gate(x)
    gate.c.data.neg_()
    assert torch.equal(gate(x), before)


def shapes(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (size, LENGTH, DIM) of Laplace or normal noise with mean 0 and variance 1 each, and which (size,)."""
    which = torch.randint(0, 2, (size,), generator=generator)
    first, second = torch.empty(2, size, LENGTH, DIM).exponential_(generator=generator)
    normal = torch.randn(size, LENGTH, DIM, generator=generator)
    x = torch.where(which[:, None, None] == 1, first - second, normal)
    x = x - x.mean(1, keepdim=True)
    return x / x.square().mean(1, keepdim=True).sqrt(), which


def moments(x: Tensor) -> Tensor:
    """Mean and variance over tokens, (size, 2 DIM)."""
    return torch.cat((x.mean(1), x.var(1)), dim=-1)


def told_apart(pool: Callable[[Tensor], Tensor], head: nn.Module, learned: list[nn.Parameter]) -> float:
    """Accuracy on fresh sequences of a linear head on what `pool` answers, both trained."""
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        x, which = shapes(128, generator)
        return F.cross_entropy(head(pool(x)), which)

    train([*head.parameters(), *learned], loss, 300, rate=3e-2)
    x, which = shapes(2000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((head(pool(x)).argmax(-1) == which).float().mean())


@pytest.mark.parametrize("gaussians", [1, 2])
def test_the_gate_tells_laplace_from_normal(gaussians: int) -> None:
    gate = sc.nn.GaussianGate(DIM, gaussians)
    found = told_apart(lambda x: gate(x).sum(1), nn.Linear(DIM, 2), list(gate.parameters()))
    print(f"{gaussians} Gaussians: {found:.4f}")
    assert found >= 0.95


def test_mean_and_variance_cannot() -> None:
    found = told_apart(moments, nn.Linear(2 * DIM, 2), [])
    print(f"moments: {found:.4f}")
    assert 0.45 <= found <= 0.55
