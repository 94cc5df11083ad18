"""S290, MVPA: channels x time in one softmax, with separate terms for content, time and channel."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.base import Sizes
from systems.helpers import qkv, train

HEADS, GROUPS, D = 4, 2, 6
pytestmark = pytest.mark.system("S290")


def weights() -> dict[str, Tensor]:
    declared = sc.mechanism("mvpa").weights(Sizes(HEADS, GROUPS, D, D))
    return {n: torch.randn(w.shape, dtype=torch.float64) for n, w in declared.items()}


def sinusoid(offset: int) -> Tensor:
    angle = [offset * 10000 ** (-2 * m / D) for m in range(D // 2)]
    return torch.tensor([*map(math.sin, angle), *map(math.cos, angle)], dtype=torch.float64)


def by_loops(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor], window: int, channels: int) -> Tensor:
    out = torch.zeros_like(q)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        g, (t, c) = h * GROUPS // HEADS, divmod(i, channels)
        keys = [j for j in range(k.shape[2]) if j // channels <= t]
        s = []
        for j in keys:
            time, channel = divmod(j, channels)
            content = (q[b, h, i] + p["content_bias"][h]) @ k[b, g, j] if abs(t - time) < window else 0.0
            s.append(
                content
                + (q[b, h, i] + p["time_bias"][h]) @ (sinusoid(t - time) @ p["time_map"][g])
                + (q[b, h, i] + p["channel_bias"][h]) @ (sinusoid(abs(c - channel)) @ p["channel_map"][g])
            )
        out[b, h, i] = torch.softmax(torch.stack(s) / math.sqrt(D), 0) @ v[b, g, keys]
    return out


@pytest.mark.parametrize(("window", "grid"), [(2, (5, 3)), (1, (4, 4)), (50, (6, 2)), (3, (7, 1))])
@pytest.mark.parametrize("kernel", ["slab", "reference"])
def test_it_equals_a_loop_over_all_pairs(window: int, grid: tuple[int, int], kernel: str) -> None:
    q, k, v = qkv(2, HEADS, math.prod(grid), D, kv=GROUPS)
    params = weights()
    found = sc.attend(q, k, v, f"gqa(2) + mvpa({window})", params=params, grid=grid, kernel=kernel)
    torch.testing.assert_close(found, by_loops(q, k, v, params, window, grid[1]), atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_loop() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, HEADS, 12, D, kv=GROUPS))
    params = {n: x.requires_grad_() for n, x in weights().items()}
    inputs = [q, k, v, *params.values()]
    found = sc.attend(q, k, v, "gqa(2) + mvpa(2)", params=params, grid=(4, 3), kernel="slab")
    got = torch.autograd.grad(found.sin().sum(), inputs)
    expected = torch.autograd.grad(by_loops(q, k, v, params, 2, 3).sin().sum(), inputs)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=0)


def test_one_set_of_weights_runs_on_any_number_of_channels() -> None:
    model = sc.nn.MVPFormer(3, dim=16, depth=2, heads=4)
    for channels in (4, 9):
        assert model(torch.randn(2, 5, channels, 3)).shape == (2, 5, channels, 3)


def test_a_later_time_moves_no_earlier_output_and_every_channel_of_its_own() -> None:
    model = sc.nn.MVPFormer(3, dim=16, depth=2, heads=4).double()
    x = torch.randn(1, 8, 4, 3, dtype=torch.float64)
    before, after = model(x), x.clone()
    after[:, 5, 1] += 1
    moved = (model(after) - before).abs().amax(-1)[0]
    assert moved[:5].max() < 1e-12
    assert moved[5:].min() > 1e-9


def test_the_order_of_the_channels_matters_up_to_a_reflection() -> None:
    model = sc.nn.MVPFormer(3, dim=16, depth=1, heads=4).double()
    x = torch.randn(1, 6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x.flip(2)), model(x).flip(2), atol=1e-12, rtol=0)
    order = [1, 0, 2, 3]
    assert (model(x[:, :, order]) - model(x)[:, :, order]).abs().max() > 1e-6


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="mvpa stands on a grid: give one"):
        sc.nn.Attention(8, 2, "mvpa")(torch.randn(1, 12, 8))
    with pytest.raises(ValueError, match=r"segments must be \(batch, times, channels, 3\), got \(1, 2, 3\)"):
        sc.nn.MVPFormer(3)(torch.zeros(1, 2, 3))


def coupled(batch: int, times: int, channels: int, generator: torch.Generator) -> Tensor:
    """AR(2) channels that their neighbours drive, (batch, times, channels, 1), after 32 steps of warm-up."""
    noise = torch.randn(batch, times + 32, channels, generator=generator)
    x = torch.zeros_like(noise)
    for t in range(2, times + 32):
        near = torch.zeros(batch, channels)
        near[:, 1:] += x[:, t - 1, :-1]
        near[:, :-1] += x[:, t - 1, 1:]
        x[:, t] = 0.2 * x[:, t - 1] - 0.3 * x[:, t - 2] + 0.5 * near + noise[:, t]
    return x[:, 32:, :, None]


def forecast(alone: bool, steps: int) -> dict[int, float]:
    """Mean squared one-step errors by number of channels, of a model that sees all channels or each alone."""
    torch.manual_seed(0)
    model, generator = sc.nn.MVPFormer(1, dim=32, depth=1, heads=4), torch.Generator().manual_seed(0)

    def error(x: Tensor) -> Tensor:
        x = x.transpose(1, 2).flatten(0, 1).unsqueeze(2) if alone else x
        return (model(x[:, :-1]) - x[:, 1:]).square().mean()

    train(model.parameters(), lambda step: error(coupled(8, 13, 3 + step % 6, generator)), steps, rate=5e-3)
    test = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return {c: float(error(coupled(64, 13, c, test))) for c in (3, 5, 8)}


def test_coupled_channels_are_forecast_better_together() -> None:
    together, alone = forecast(False, 150), forecast(True, 150)
    for channels, error in together.items():
        x = coupled(64, 13, channels, torch.Generator().manual_seed(2))
        assert error <= 0.9 * alone[channels], (together, alone)
        assert error < float((x[:, 1:] - x[:, :-1]).square().mean())
