"""S148, Mega: gated attention over moving averages, in chunks that only the averages cross."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import FeedForward
from saccade.tasks.adding import Adding
from systems.helpers import exponent, flops, train

pytestmark = pytest.mark.system("S148")


def by_recurrence(ema: sc.nn.DampedEMA, x: Tensor) -> Tensor:
    """h_t = alpha beta x_t + (1 - alpha delta) h_{t-1}, y_t = eta.h_t, token by token."""
    alpha, delta = ema.alpha.sigmoid(), ema.delta.sigmoid()
    h, rows = torch.zeros(len(x), *alpha.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = alpha * ema.beta * x[:, t, :, None] + (1 - alpha * delta) * h
        rows.append((ema.eta * h).sum(-1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("n", [1, 2, 37, 200])
def test_the_convolution_equals_the_recurrence_and_the_steps(
    n: int, dtype: torch.dtype, tolerance: float
) -> None:
    ema = sc.nn.DampedEMA(5, 4).to(dtype)
    x = torch.randn(2, n, 5, dtype=dtype)
    want = by_recurrence(ema, x)
    torch.testing.assert_close(ema(x), want, atol=tolerance, rtol=0)
    state, rows = ema.init_state(2), []
    for piece in x.split(1 if n < 50 else 30, 1):
        y, state = ema.step(piece, state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), want, atol=tolerance, rtol=0)


def test_gradients_are_those_of_the_recurrence() -> None:
    ema = sc.nn.DampedEMA(3, 4).double()
    x = torch.randn(2, 20, 3, dtype=torch.float64, requires_grad=True)
    inputs, weight = [x, *ema.parameters()], torch.randn(2, 20, 3, dtype=torch.float64)
    pairs = zip(
        *(torch.autograd.grad((y * weight).sum(), inputs) for y in (ema(x), by_recurrence(ema, x))),
        strict=True,
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


def test_averages_in_low_precision_and_rates_at_their_ends() -> None:
    ema = sc.nn.DampedEMA(4, 3)
    x = torch.randn(1, 50, 4)
    low = sc.nn.DampedEMA(4, 3).to(torch.bfloat16)
    low.load_state_dict(ema.state_dict())
    assert low(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(low(x.bfloat16()).float(), ema(x), atol=0.1, rtol=0.05)
    with torch.no_grad():
        ema.alpha.fill_(50), ema.delta.fill_(50)
    y = ema(x)
    torch.testing.assert_close(y, x * (ema.beta * ema.eta).sum(-1), atol=1e-5, rtol=0)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ema.parameters())
    with torch.no_grad():
        ema.delta.fill_(-200)
    assert torch.isfinite(ema(torch.randn(1, 3000, 4))).all()


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def by_formula(m: sc.nn.Mega, x: Tensor) -> Tensor:
    """One sample (n, dim), a row and a key at a time, as the paper writes it."""
    n = len(x)
    moved = by_recurrence(m.averages, x[None])[0]
    if m.back is not None:
        moved = moved + by_recurrence(m.back, x.flip(0)[None])[0].flip(0)
    z = silu(m.shared_proj(moved))
    q, k = z * m.scales[0] + m.shifts[0], z * m.scales[1] + m.shifts[1]
    v, size, rows = silu(m.value_proj(x)), m.chunk or n, []
    clip = (m.rel_bias.shape[1] - 1) // 2
    for i in range(n):
        first = i // size * size
        keys = range(first, i + 1 if m.causal else min(n, first + size))
        bias = [m.rel_bias[0, max(-clip, min(clip, j - i)) + clip] for j in keys]
        if "laplace" in str(m.mechanism):
            s = torch.stack([q[i] @ k[j] / len(keys) + b for j, b in zip(keys, bias, strict=True)])
            w = (1 + torch.erf((s - math.sqrt(1 / 2)) / (math.sqrt(1 / (4 * math.pi)) * math.sqrt(2)))) / 2
        else:
            s = torch.stack([q[i] @ k[j] / math.sqrt(len(q[i])) + b for j, b in zip(keys, bias, strict=True)])
            w = torch.softmax(s, 0)
        rows.append(w @ v[list(keys)])
    r, u = silu(m.reset_proj(moved)), torch.sigmoid(m.update_proj(moved))
    h = silu(m.hidden_proj(moved) + m.out_proj(r * torch.stack(rows)))
    return u * h + (1 - u) * x


def layer(**options: object) -> sc.nn.Mega:
    made = sc.nn.Mega(6, **{"rank": 3, "clip": 3, **options}).double()  # type: ignore[arg-type]
    for p in (made.rel_bias, made.shifts):
        nn.init.normal_(p)
    return made


@pytest.mark.parametrize("weights", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 4, 50])
def test_the_layer_is_the_papers_formula_padding_and_all(
    weights: str, causal: bool, chunk: int | None
) -> None:
    m = layer(weights=weights, causal=causal, chunk=chunk)
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    found = m(x)
    for b in range(3):
        torch.testing.assert_close(found[b], by_formula(m, x[b]), atol=1e-12, rtol=0)
    lengths = torch.tensor([11, 6, 0])
    for b, n in enumerate(lengths.tolist()):
        x[b, n:] = math.nan
    padded = m(x, key_lengths=lengths)
    assert torch.isfinite(padded).all()
    for b, n in ((0, 11), (1, 6)):
        torch.testing.assert_close(padded[b, :n], by_formula(m, x[b, :n]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("weights", ["softmax", "laplace"])
def test_gradients_of_the_layer_are_those_of_the_formula(weights: str) -> None:
    m = layer(weights=weights, chunk=4)
    x = torch.randn(1, 10, 6, dtype=torch.float64, requires_grad=True)
    inputs, weight = [x, *m.parameters()], torch.randn(10, 6, dtype=torch.float64)
    pairs = zip(
        *(torch.autograd.grad((y * weight).sum(), inputs) for y in (m(x)[0], by_formula(m, x[0]))),
        strict=True,
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("weights", ["softmax", "laplace"])
@pytest.mark.parametrize("chunk", [20, 64])
def test_a_chunk_that_holds_all_tokens_is_the_full_form(weights: str, chunk: int) -> None:
    whole, cut = layer(weights=weights), layer(weights=weights, chunk=chunk)
    cut.load_state_dict(whole.state_dict())
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    torch.testing.assert_close(cut(x), whole(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("weights", ["softmax", "laplace"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_steps_equal_the_whole_call_with_a_state_no_longer_than_a_chunk(
    weights: str, chunk: int | None
) -> None:
    m = layer(weights=weights, chunk=chunk)
    x = torch.randn(2, 23, 6, dtype=torch.float64)
    want = m(x)
    for sizes in ([1] * 23, [1, 3, 9, 0, 2, 7, 1]):
        state, rows = m.init_state(2), []
        for piece in x.split(sizes, 1):
            y, state = m.step(piece, state)
            rows.append(y)
            assert chunk is None or state.attention.length <= chunk
        torch.testing.assert_close(torch.cat(rows, 1), want, atol=1e-12, rtol=0)


def test_later_tokens_change_nothing_before_them() -> None:
    m, x = layer(chunk=4), torch.randn(1, 12, 6, dtype=torch.float64)
    other = torch.cat((x[:, :7], torch.randn(1, 5, 6, dtype=torch.float64)), 1)
    torch.testing.assert_close(m(other)[:, :7], m(x)[:, :7], atol=1e-12, rtol=0)
    assert (m(other) - m(x))[:, 7:].abs().min() > 0


def test_work_in_chunks_grows_with_the_length() -> None:
    m, sizes = sc.nn.Mega(8, chunk=16), [256, 512, 1024]
    assert exponent(sizes, [flops(lambda n=n: m(torch.zeros(1, n, 8))) for n in sizes]) <= 1.02
    assert m(torch.zeros(2, 0, 8)).shape == (2, 0, 8)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="weights must be one of softmax, laplace, got 'relu'"):
        sc.nn.Mega(8, weights="relu")
    with pytest.raises(ValueError, match="a chunk has at least 1 token, got 0; leave it out"):
        sc.nn.Mega(8, chunk=0)
    with pytest.raises(ValueError, match="query_dim and value_dim must be at least 1, got 4 and 0"):
        sc.nn.Mega(8, value_dim=0)
    with pytest.raises(ValueError, match="longest above 4, got dim=8, rank=0"):
        sc.nn.Mega(8, rank=0)
    with pytest.raises(ValueError, match=r"the averages must be \(2, 8, 16\), got \(1, 8, 16\)"):
        sc.nn.DampedEMA(8).step(torch.zeros(2, 1, 8), torch.zeros(1, 8, 16))
    with pytest.raises(sc.NotSupported, match="reads later keys, so it cannot go on token by token"):
        sc.nn.Mega(8, causal=False).init_state(1)


class Adder(nn.Module):
    """Tokens through a small net, one layer that mixes them, and a feed-forward one, to a number at every place."""

    def __init__(self, mix: nn.Module, dim: int = 16) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(2, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.mix, self.write = mix, nn.Linear(dim, 1)
        self.feed_forward = FeedForward(dim, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        mixed = self.mix(x)
        x = self.norms[0](mixed if isinstance(self.mix, sc.nn.Mega) else x + mixed)
        return self.write(self.norms[1](x + self.feed_forward(x))).squeeze(-1)


def adding_error(mix: nn.Module, steps: int, seed: int = 0) -> float:
    """Squared error of sums over 128 numbers, after shorter ones; a layer with averages learns all sums on the way."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Adder(mix)
    first = 0 if isinstance(mix, sc.nn.Mega) else -1

    def loss(step: int) -> Tensor:
        length = 128 if 2 * step >= steps else 64 if 4 * step >= steps else 32
        x, _ = Adding(length).batch(32, generator)
        return (model(x) - x.prod(-1).cumsum(1))[:, first:].square().mean()

    train(model.parameters(), loss, steps, rate=1e-2)
    x, sums = Adding(128).batch(1000, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return float((model(x)[:, -1] - sums).square().mean())


def test_averages_carry_what_was_marked_from_chunk_to_chunk() -> None:
    assert adding_error(sc.nn.Mega(16, chunk=32, rank=8, clip=31), 700) <= 0.02
    assert adding_error(sc.nn.Attention(16, 2, "causal + chunk(32)"), 300) >= 0.1


@pytest.mark.slow
def test_the_same_with_laplace_weights() -> None:
    assert adding_error(sc.nn.Mega(16, chunk=32, rank=8, clip=31, weights="laplace"), 700) <= 0.02
