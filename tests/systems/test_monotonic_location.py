"""S231, monotonic location attention: a Gaussian that walks along the keys, row after row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.copy import Copy
from saccade.tasks.metric import exact_match
from saccade.tasks.recall import SILENT
from systems.helpers import train

pytestmark = pytest.mark.system("S231")


def inputs(dim: int = 6, rows: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, rows, dim, dtype=torch.float64),
        torch.randn(2, keys, dim, dtype=torch.float64),
        torch.randn(2, keys, 3, dtype=torch.float64),
    )


@pytest.mark.parametrize("step", ["one", "relu", "sigmoid"])
@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("lengths", [None, [7, 4], [1, 2]])
@torch.no_grad()
def test_rows_by_loops(step: str, mix: bool, lengths: list[int] | None) -> None:
    layer = sc.nn.MonotonicLocation(6, step, mix=mix).double()
    q, k, v = inputs()
    out, w, mu = layer(q, k, v, None if lengths is None else torch.tensor(lengths))
    for b in range(2):
        n = 7 if lengths is None else lengths[b]
        last = max(1, n - 1)
        mean = -1 / last
        for t in range(5):
            x = q[b, t]
            advance = 1.0
            if layer.advance is not None:
                raw = float(layer.advance(x))
                advance = max(0.0, raw) if step == "relu" else 1 / (1 + math.exp(-raw))
            centre = mean + advance / last
            sigma = (max(0.0, float(layer.width(x))) + 0.27) / n
            top = max(-((j / last - centre) ** 2) / (2 * sigma**2) for j in range(n))
            a = [math.exp(-((j / last - centre) ** 2) / (2 * sigma**2) - top) for j in range(n)]
            a = [y / sum(a) for y in a]
            if layer.gate is not None:
                g = 1 / (1 + math.exp(-float(layer.gate(x))))
                e = [math.exp(float(x @ k[b, j]) / math.sqrt(6)) for j in range(n)]
                a = [g * y + (1 - g) * z / sum(e) for y, z in zip(a, e, strict=True)]
            mean = sum(y * j / last for j, y in enumerate(a))
            assert float(mu[b, t]) == pytest.approx(centre, abs=1e-10)
            assert w[b, t, :n].tolist() == pytest.approx(a, abs=1e-10)
            assert bool((w[b, t, n:] == 0).all())
            torch.testing.assert_close(out[b, t], sum(y * v[b, j] for j, y in enumerate(a)))


@pytest.mark.parametrize("step", ["one", "relu", "sigmoid"])
def test_weights_sum_to_one_and_the_centre_never_steps_back_from_the_mean(step: str) -> None:
    layer = sc.nn.MonotonicLocation(6, step).double()
    q, k, v = inputs(rows=40, keys=20)
    _, w, mu = layer(q, k, v)
    torch.testing.assert_close(w.sum(-1), torch.ones_like(mu), atol=1e-12, rtol=0)
    mean = (w * torch.linspace(0, 1, 20, dtype=torch.float64)).sum(-1)
    assert bool((mu[:, 1:] >= mean[:, :-1] - 1e-12).all())


def test_the_centre_falls_by_less_than_half_a_key_and_only_by_rounding_to_keys() -> None:
    layer = sc.nn.MonotonicLocation(6, "relu").double()
    with torch.no_grad():
        layer.width.weight.zero_()
        layer.width.bias.zero_()
    q, k, v = inputs(rows=15, keys=30)
    _, _, mu = layer(q, k, v)
    inside = mu[:, 1:] < 1
    assert float((mu.diff(dim=-1) * 29)[inside].detach().min()) > -0.5


def test_one_step_a_row_reads_the_keys_in_order() -> None:
    layer = sc.nn.MonotonicLocation(6, "one").double()
    with torch.no_grad():
        layer.width.weight.zero_()
        layer.width.bias.fill_(-1)
    q, k, v = inputs(rows=7)
    _, w, mu = layer(q, k, v)
    assert bool((mu.diff(dim=-1) > 0).all())
    assert w.argmax(-1).tolist() == [list(range(7))] * 2
    assert float(w.detach().diagonal(dim1=-2, dim2=-1).min()) > 0.9


def test_gradients_flow_through_all_rows_and_padding_is_not_read() -> None:
    layer = sc.nn.MonotonicLocation(6, "sigmoid", mix=True).double()
    q, k, v = (x.requires_grad_() for x in inputs())
    assert torch.autograd.gradcheck(lambda *x: layer(*x)[0], (q, k, v))
    poisoned = [x.detach().clone() for x in (k, v)]
    for x in poisoned:
        x[1, 4:] = math.nan
    lengths = torch.tensor([7, 4])
    found = layer(q, *poisoned, lengths)[0]
    torch.testing.assert_close(found[1:], layer(q[1:], k[1:, :4], v[1:, :4])[0])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="step must be one of one, relu, sigmoid, got 'two'"):
        sc.nn.MonotonicLocation(4, "two")
    layer, x = sc.nn.MonotonicLocation(4), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="needs a key to stand on, got lengths"):
        layer(x, x, x, torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="must share batch and length"):
        layer(x, x, x[:, :2])
    assert layer(x[:, :0], x, x)[0].shape == (2, 0, 4)


def written(step: str | None, steps: int, reverse: bool = False, repeats: tuple[int, ...] = (1,)) -> float:
    """The share of 64 strings of 30 symbols that are written without an error, after training on 5 to 10 symbols."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    task = Copy(10, shortest=5, reverse=reverse, repeats=repeats)
    model = sc.nn.MonotonicSeq2Seq(task.vocab, dim=32, step=step)

    def loss(at: int) -> Tensor:
        source, lengths, answer = task.pairs(32, generator)
        logits = model(F.pad(source, (0, 1), value=task.end), lengths + 1, task.end, answer)
        return F.cross_entropy(logits.flatten(0, 1), answer.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    long = Copy(30, reverse=reverse, repeats=repeats)
    source, lengths, answer = long.pairs(64, torch.Generator().manual_seed(1))
    found = model.greedy(F.pad(source, (0, 1), value=task.end), lengths + 1, task.end, answer.shape[1])
    return exact_match(found, answer)


@pytest.mark.parametrize("reverse", [False, True])
def test_it_copies_three_times_the_trained_length_in_either_direction(reverse: bool) -> None:
    assert written("one", 300, reverse) >= 0.9
    assert written(None, 300, reverse) <= 0.2


def test_learned_steps_write_symbols_as_often_as_each_asks() -> None:
    assert written("relu", 400, repeats=(1, 2, 3)) >= 0.8
