"""Absolute positions against their formulas, and models with each kind."""

from __future__ import annotations

import math

import pytest
import torch

import saccade as sc


@pytest.mark.parametrize(("base", "start"), [(10000.0, 0), (100.0, 3), (10000.0, 1 << 20)])
def test_sinusoids(base: float, start: int) -> None:
    x = torch.randn(2, 5, 6)
    got = sc.nn.SinusoidalPositions(6, base, scale=0.5)(x, start)
    for n in range(5):
        for m in range(3):
            angle = (start + n) * base ** (-2 * m / 6)
            for c, wave in ((2 * m, math.sin), (2 * m + 1, math.cos)):
                want = x[:, n, c] + 0.5 * wave(angle)
                torch.testing.assert_close(got[:, n, c], want, atol=1e-6, rtol=0)


def test_learned_positions_are_rows_of_their_table() -> None:
    positions, x = sc.nn.LearnedPositions(9, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(positions(x, 6), x + positions.weight[6:9])
    with pytest.raises(ValueError, match="10 tokens are more than max_length=9"):
        positions(x, 7)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "none"])
def test_a_model_decodes_with_each_kind(kind: str) -> None:
    model = sc.nn.Transformer(16, dim=16, depth=2, heads=2, max_length=12, positions=kind).double()
    tokens = torch.randint(16, (2, 12))
    whole, states, rows = model(tokens), model.init_state(2), []
    for t in range(12):
        y, states = model.step(tokens[:, t : t + 1], states)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-12, rtol=0)
    whole.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_positions_the_past_is_a_bag_at_any_length() -> None:
    model = sc.nn.Transformer(16, dim=16, depth=1, heads=2, max_length=4, positions="none").double()
    tokens = torch.randint(16, (1, 20))
    mixed = tokens.clone()
    mixed[:, :19] = tokens[:, torch.randperm(19)]
    torch.testing.assert_close(model(tokens)[:, -1], model(mixed)[:, -1], atol=1e-12, rtol=0)
    placed = sc.nn.Transformer(16, dim=16, depth=1, heads=2, max_length=4, positions="sinusoidal").double()
    assert (placed(tokens)[:, -1] - placed(mixed)[:, -1]).abs().max() > 1e-6


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="positions must be learned, sinusoidal or none, got 'rotary'"):
        sc.nn.Transformer(8, positions="rotary")
    with pytest.raises(ValueError, match="dim must be even, got 5"):
        sc.nn.SinusoidalPositions(5)
    with pytest.raises(ValueError, match="base must be above 0, got 0"):
        sc.nn.SinusoidalPositions(4, base=0)
