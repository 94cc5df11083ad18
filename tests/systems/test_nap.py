"""S213, NAP: rows of weights with a learned mean and deviation, which may leave the hull of the values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.tasks.argmin import ArgMin
from systems.helpers import below, qkv, stepwise, train

HEADS, D = 2, 6
GAIN, BIAS = torch.tensor([1.5, 0.4], dtype=torch.float64), torch.tensor([0.3, -0.1], dtype=torch.float64)
PARAMS = {"row_gain": GAIN, "row_bias": BIAS}
pytestmark = pytest.mark.system("S213")


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """NAP row by row, causal."""
    out = torch.zeros_like(v)
    for h in range(HEADS):
        for i in range(q.shape[2]):
            s = [float(q[0, h, i] @ k[0, h, j]) / math.sqrt(D) for j in range(i + 1)]
            mean = sum(s) / len(s)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in s) / len(s))
            for j, x in enumerate(s):
                w = float(GAIN[h]) * (x - mean) / (deviation + 1e-5) + float(BIAS[h])
                out[0, h, i] += w * v[0, h, j]
    return out


@pytest.mark.parametrize("kernel", ["slab", "reference"])
def test_every_path_equals_the_formula(kernel: str) -> None:
    q, k, v = qkv(1, HEADS, 30, D)
    found = sc.attend(q, k, v, "causal + nap", params=PARAMS, kernel=kernel)
    torch.testing.assert_close(found, written_out(q, k, v), atol=1e-10, rtol=0)


def test_masked_rows_have_the_learned_mean_and_deviation() -> None:
    q, k, v = qkv(2, HEADS, 20, D)
    mask = (torch.rand(2, HEADS, 20, 20) < 0.5) | torch.eye(20, dtype=torch.bool)
    w = sc.attend(q, k, v, "nap", params=PARAMS, mask=mask, need=("weights",)).weights
    assert not w[~mask].any()
    count = mask.sum(-1)
    mean = w.sum(-1) / count
    deviation = ((w - mean.unsqueeze(-1)).square() * mask).sum(-1).div(count).sqrt()
    torch.testing.assert_close(mean, BIAS[:, None].expand_as(mean), atol=1e-10, rtol=0)
    want = torch.where(count > 1, GAIN[:, None], 0.0)
    torch.testing.assert_close(deviation, want.expand_as(deviation), atol=1e-3, rtol=1e-3)


def test_scale_and_shift_of_the_scores_do_not_matter() -> None:
    q, k, v = qkv(2, HEADS, 12, D)
    plain = sc.attend(q, k, v, "causal + nap", params=PARAMS)
    scaled = sc.attend(7 * q, k, v, "causal + nap", params=PARAMS)
    torch.testing.assert_close(scaled, plain, atol=1e-3, rtol=1e-3)
    shifted = sc.attend(q, k + torch.randn(2, HEADS, 1, D, dtype=torch.float64), v, "nap", params=PARAMS)
    torch.testing.assert_close(shifted, sc.attend(q, k, v, "nap", params=PARAMS), atol=1e-10, rtol=0)


def test_a_row_of_one_key_weighs_it_with_the_bias() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, HEADS, 5, D))
    out = sc.attend(q, k, v, "causal + nap", params=PARAMS)
    torch.testing.assert_close(out[:, :, 0], BIAS[:, None] * v[:, :, 0])
    grads = torch.autograd.grad(out[:, :, 0].sum(), (q, k))
    assert not any(g.any() for g in grads)


def test_an_output_leaves_the_convex_hull_of_the_values() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 3, 1)
    v = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3, 1)
    plain = {"row_gain": torch.ones(1), "row_bias": torch.full((1,), 1 / 3)}
    assert float(sc.attend(q, k, v, "nap", params=plain)) == pytest.approx(0.5 + 1.5**0.5, abs=1e-3)
    assert 0 <= float(sc.attend(9 * q, k, v, "full")) <= 1


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(24, 4, "causal + nap").double()
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_tiles_equal_the_dense_computation_in_float32() -> None:
    q, k, v = qkv(1, HEADS, 300, 16, dtype=torch.float32)
    params = {n: x.float() for n, x in PARAMS.items()}
    s = (q @ k.transpose(-1, -2) / 4).masked_fill(~below(300), math.nan)
    mean = s.nanmean(-1, keepdim=True)
    deviation = (s - mean).square().nanmean(-1, keepdim=True).sqrt()
    w = (s - mean) / (deviation + 1e-5) * params["row_gain"][:, None, None] + params["row_bias"][
        :, None, None
    ]
    found = sc.attend(q, k, v, "causal + nap", params=params)
    torch.testing.assert_close(found, w.nan_to_num() @ v, atol=1e-4, rtol=1e-4)


class Plain(nn.Module):
    """Values (B, n, dim) pooled without weights, by their sum or channel by channel by their maximum, (B, 1, dim)."""

    def __init__(self, dim: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.value_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        v = self.value_proj(x)
        return self.out_proj(v.sum(1, keepdim=True) if self.how == "sum" else v.amax(1, keepdim=True))


class Pooled(nn.Module):
    """Items of a set (B, n, width), each for itself through a network, pooled by one learned query, to logits."""

    def __init__(self, task: ArgMin, mechanism: str, dim: int = 32) -> None:
        super().__init__()
        self.items = nn.Sequential(
            nn.Linear(task.width, dim), nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU()
        )
        self.norm = nn.LayerNorm(2 * dim)
        self.query = nn.Parameter(torch.randn(1, 1, 2 * dim) / 2)
        self.pool: nn.Module = (
            Plain(2 * dim, mechanism)
            if mechanism in ("sum", "max")
            else sc.nn.Attention(2 * dim, 2, mechanism)
        )
        self.answer = nn.Linear(2 * dim, task.values)

    def forward(self, items: Tensor) -> Tensor:
        x = self.norm(self.items(items))
        return self.answer(self.pool(self.query.expand(len(x), -1, -1), x)[:, 0])


def value_at_the_least_key(mechanism: str, rate: float, steps: int) -> float:
    """Accuracy on fresh sets after training at one learning rate."""
    torch.manual_seed(0)
    task, generator = ArgMin(), torch.Generator().manual_seed(0)
    model = Pooled(task, mechanism)

    def loss(step: int) -> Tensor:
        items, values = task.batch(64, generator)
        return F.cross_entropy(model(items), values)

    train(model.parameters(), loss, steps, rate)
    items, values = task.batch(2000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(items).argmax(-1) == values).float().mean())


@pytest.mark.parametrize("rate", [1e-3, 4e-3, 16e-3])
def test_the_value_at_the_least_key_is_learned_at_rates_sixteen_times_apart(rate: float) -> None:
    assert ArgMin().baseline < 0.5
    found = value_at_the_least_key("nap", rate, steps=500)
    assert found >= 0.9


@pytest.mark.slow
def test_the_pools_without_weights_that_it_stands_beside() -> None:
    """The maximum finds an extreme by itself; the sum falls behind."""
    most, total = (value_at_the_least_key(how, 4e-3, steps=500) for how in ("max", "sum"))
    assert most >= 0.95
    assert 0.8 <= total <= most - 0.05
