"""S177, attention as an RNN: one learned query a head reads every prefix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.recall import SILENT, Recall, accuracy
from saccade.tasks.waves import Waves
from systems.helpers import below, dense, flops, qkv, stepwise, train

pytestmark = pytest.mark.system("S177")


@pytest.mark.parametrize("length", [1, 5, 64, 130])
@pytest.mark.parametrize("kv", [1, 4])
def test_the_scan_is_causal_softmax_with_one_query(length: int, kv: int) -> None:
    q, k, v = qkv(2, 4, 1, 8, kv=kv, keys=length)
    found = sc.attend(q, k, v, "aaren", need=("out", "lse"))
    repeated = q.expand(-1, -1, length, -1)
    torch.testing.assert_close(found.out, dense(repeated, k, v, below(length)), atol=1e-12, rtol=0)
    s = (q @ k.repeat_interleave(4 // kv, 1).transpose(-1, -2)).squeeze(2) / 8**0.5
    torch.testing.assert_close(found.lse, torch.logcumsumexp(s, -1), atol=1e-12, rtol=0)
    single = sc.attend(q.float(), k.float(), v.float(), "aaren")
    torch.testing.assert_close(single.double(), found.out, atol=1e-6, rtol=1e-5)


def grouped(parts: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The parts merged two neighbours at a time, in a random bracketing."""
    parts = list(parts)
    while len(parts) > 1:
        at = int(torch.randint(len(parts) - 1, (), generator=generator))
        parts[at : at + 2] = [sc.merge(parts[at : at + 2])]
    return parts[0]


def test_any_bracketing_of_the_merge_gives_the_scan() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = qkv(1, 2, 1, 8, keys=12)
    whole = sc.attend(q, k, v, "aaren")[:, :, -1]
    tokens = [(v[:, :, t], (q[:, :, 0] * k[:, :, t]).sum(-1) / 8**0.5) for t in range(12)]
    for _ in range(50):
        torch.testing.assert_close(grouped(tokens, generator)[0], whole, atol=1e-12, rtol=0)


def test_the_merge_is_associative_on_a_thousand_random_triples() -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        a, b, c = ((torch.randn(1000, 6, dtype=dtype), 20 * torch.randn(1000, dtype=dtype)) for _ in range(3))
        left, right = sc.merge([sc.merge([a, b]), c]), sc.merge([a, sc.merge([b, c])])
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)
        swapped = sc.merge([c, b, a])
        torch.testing.assert_close(left, swapped, atol=tolerance, rtol=tolerance)
        empty = (torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf))
        torch.testing.assert_close(sc.merge([a, empty]), a, atol=tolerance, rtol=0)


def test_streaming_equals_the_parallel_form_with_a_state_of_one_size() -> None:
    layer = sc.nn.Attention(32, 4, "aaren").double()
    x = torch.randn(2, 150, 32, dtype=torch.float64)
    outs, held = stepwise(layer, x)
    torch.testing.assert_close(outs, layer(x), atol=1e-12, rtol=0)
    assert set(held) == {2 * 4 * (8 + 1) * 8}
    state, parts = layer.init_state(2), []
    for piece in x.split([1, 40, 64, 45], dim=1):
        y, state = layer.step(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), atol=1e-12, rtol=0)


def test_the_query_belongs_to_the_layer_and_learns() -> None:
    layer = sc.nn.Attention(32, 4, "aaren")
    assert layer.query_proj is None
    assert layer.query.shape == (4, 8)
    layer(torch.randn(2, 20, 32)).square().sum().backward()
    assert layer.query.grad.abs().max() > 0


@pytest.mark.parametrize("n", [1024, 4096])
def test_work_doubles_with_the_length(n: int) -> None:
    def cost(n: int) -> tuple[int, int]:
        q, k, v = qkv(1, 2, 1, 16, keys=n, dtype=torch.float32)
        shape = sc.Shape(1, 2, 1, 16, keys=n)
        return flops(lambda: sc.attend(q, k, v, "aaren")), sc.plan("aaren", shape).cost.flops

    for small, large in zip(cost(n), cost(2 * n), strict=True):
        assert large <= 2.1 * small


class Forecaster(torch.nn.Module):
    """Patches of a series in, the next patch out."""

    def __init__(self, mechanism: str, patches: int, patch: int, dim: int = 32) -> None:
        super().__init__()
        self.model = sc.nn.Transformer(1, dim, depth=2, heads=4, mechanism=mechanism, max_length=patches)
        self.read, self.write = torch.nn.Linear(patch, dim), torch.nn.Linear(dim, patch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x) + self.model.embedding.positions.weight[: x.shape[1]]
        for block in self.model.blocks:
            x = block(x)
        return self.write(self.model.norm(x))


def forecast_error(mechanism: str) -> float:
    """Mean squared error of the next eight values, from the middle of held-out series on."""
    torch.manual_seed(0)
    task, generator = Waves(length=64), torch.Generator().manual_seed(0)
    model = Forecaster(mechanism, patches=8, patch=8)

    def error(series: Tensor) -> Tensor:
        x = series.unflatten(-1, (8, 8))
        return (model(x[:, :-1]) - x[:, 1:])[:, 3:].square().mean()

    train(model.parameters(), lambda step: error(task.batch(64, generator)), steps=400, rate=5e-3)
    with torch.no_grad():
        return float(error(task.batch(1000, torch.Generator().manual_seed(1))))


def test_forecasts_mixtures_of_sines_nearly_as_well_as_a_transformer() -> None:
    recurrent, full = forecast_error("aaren"), forecast_error("causal")
    assert recurrent <= 1.3 * full
    assert recurrent < 0.1 * Waves().chance


def recalled(mechanism: str) -> float:
    """Accuracy on keys and values that were shown once, after training with few pairs and with many."""
    torch.manual_seed(0)
    task, generator = Recall(16, pairs=4, queries=8, keys=8, values=8), torch.Generator().manual_seed(0)
    model = sc.nn.Transformer(task.vocab, dim=64, depth=2, heads=2, mechanism=mechanism, max_length=16)
    for table in (model.embedding.tokens, model.embedding.positions):
        torch.nn.init.normal_(table.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(64, generator, pairs=(1, 2, 4)[step % 3])
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps=400, rate=3e-3)
    tokens, targets = task.batch(500, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_cannot_look_up_what_a_token_asks_for() -> None:
    """The price of a query that does not depend on the token."""
    assert recalled("causal") > 0.95
    assert recalled("aaren") < 0.4
