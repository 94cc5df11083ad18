"""S172, Titans: a net that learns by gradient descent while it reads, as context, as a gate and as a layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.memory import recall
from saccade.nn.transformer import FeedForward
from saccade.tasks.recall import SILENT, Recall, accuracy
from systems.helpers import exponent, flops, train

pytestmark = pytest.mark.system("S172")

B, H, M, E = 2, 2, 4, 3


def net(depth: int, scale: float = 0.5) -> tuple[Tensor, ...]:
    sizes = [M, *[5] * (depth - 1), E]
    return tuple(scale * torch.randn(B, H, sizes[n + 1], sizes[n], dtype=torch.float64) for n in range(depth))


def tensors(n: int, theta: float = 0.05) -> list[Tensor]:
    """q, k of length one, v, and theta, eta and alpha with some at the ends of their ranges."""
    q, k = F.normalize(torch.randn(2, B, H, n, M, dtype=torch.float64), dim=-1)
    gates = torch.rand(3, B, H, n, dtype=torch.float64)
    gates[0] *= theta
    if n > 9:
        gates[1, ..., 3], gates[1, ..., 8], gates[2, ..., 5], gates[2, ..., 7] = 0, 1, 1, 0
    return [q, k, torch.randn(B, H, n, E, dtype=torch.float64), *gates]


def by_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    weights: tuple[Tensor, ...],
    chunk: int,
    create: bool = False,
) -> Tensor:
    """Token by token, with gradients of the loss by autograd at the weights of the chunk's start."""
    now, s = list(weights), [torch.zeros_like(w) for w in weights]
    start, rows = now, []
    for t in range(q.shape[2]):
        start = now if t % chunk == 0 else start
        at = [w if create and w.requires_grad else w.detach().requires_grad_() for w in start]
        x = k[:, :, t : t + 1]
        for n, w in enumerate(at):
            x = x @ w.mT
            x = x * torch.sigmoid(x) if n + 1 < len(at) else x
        loss = (x - v[:, :, t : t + 1]).square().sum()
        grads = torch.autograd.grad(loss, at, create_graph=create)
        th, et, al = (g[:, :, t, None, None] for g in (theta, eta, alpha))
        s = [et * a - th * g for a, g in zip(s, grads, strict=True)]
        now = [(1 - al) * w + a for w, a in zip(now, s, strict=True)]
        rows.append(recall(tuple(now), q[:, :, t : t + 1]))
    return torch.cat(rows, 2)


def run(given: list[Tensor], weights: tuple[Tensor, ...], chunk: int) -> Tensor:
    return sc.nn.neural_memory(*given, sc.nn.MemoryState.of(weights), chunk)[0]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_chunks_equal_steps_of_gradient_descent_from_the_same_chunk_start(depth: int, chunk: int) -> None:
    given, weights = tensors(21), net(depth)
    want = by_autograd(*given, weights, chunk)  # type: ignore[arg-type]
    torch.testing.assert_close(run(given, weights, chunk), want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [1, 3])
def test_training_gradients_without_nested_autograd_are_those_of_nested_autograd(
    depth: int, chunk: int
) -> None:
    given = [x.requires_grad_() for x in tensors(7)]
    weights = tuple(w.requires_grad_() for w in net(depth))
    inputs, mix = [*given, *weights], torch.randn(B, H, 7, E, dtype=torch.float64)
    found, want = run(given, weights, chunk), by_autograd(*given, weights, chunk, create=True)  # type: ignore[arg-type]
    for got, expected in zip(
        *(torch.autograd.grad((y * mix).sum(), inputs) for y in (found, want)), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_agree_with_finite_differences_also_where_gates_are_zero(depth: int) -> None:
    given = [x[:1, :1, :4].clone() for x in tensors(4)]
    given[4][..., 2] = 0.2
    weights = [w[:1, :1].clone() for w in net(depth)]
    inputs = [x.requires_grad_() for x in (*given, *weights)]

    def call(*x: Tensor) -> Tensor:
        return run(list(x[:6]), x[6:], 3)

    assert torch.autograd.gradcheck(call, inputs)
    zeros = [x.detach().clone().requires_grad_() for x in given]
    with torch.no_grad():
        zeros[4].zero_(), zeros[5].fill_(1.0)
    got, want = (
        torch.autograd.grad(y.square().sum(), zeros)
        for y in (run(zeros, tuple(weights), 2), by_autograd(*zeros, tuple(weights), 2, create=True))  # type: ignore[arg-type]
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_a_linear_memory_without_momentum_and_forgetting_is_the_delta_rule() -> None:
    q, k, v = torch.randn(3, B, H, 150, M, dtype=torch.float64)
    x = torch.randn(B, H, 150, dtype=torch.float64)
    zero = torch.zeros(B, H, 150, dtype=torch.float64)
    state = sc.nn.MemoryState.of((torch.zeros(B, H, M, M, dtype=torch.float64),))
    units = (F.normalize(y, dim=-1) for y in (q, k))
    found, after = sc.nn.neural_memory(*units, v, x.sigmoid() / 2, zero, zero, state, chunk=1)
    bare = sc.attend(q, k, v, "unit + causal + identity + delta", streams={"beta": x}, need=("out", "state"))
    torch.testing.assert_close(found, bare.out, atol=1e-10, rtol=0)
    assert bare.state is not None
    torch.testing.assert_close(after.weights[0].mT, bare.state.tensors["s"], atol=1e-10, rtol=0)
    m = sc.mechanism("delta_net")
    scale = {name: w.make().double() for name, w in m.weights(sc.parts.base.Sizes(H, H, M, M)).items()}
    whole = sc.attend(q, k, v, m, streams={"beta": x}, params=scale)
    normed = sc.attend(found, found, found, "window(1) + out_norm", params=scale)
    torch.testing.assert_close(normed, whole, atol=1e-10, rtol=0)


def test_without_writing_the_net_only_fades() -> None:
    (q, k, v, theta, eta, alpha), weights = tensors(20), net(2)
    state = sc.nn.MemoryState.of(weights)
    for t in range(20):
        at = slice(t, t + 1)
        gates = (0 * theta[..., at], eta[..., at], alpha[..., at])
        _, after = sc.nn.neural_memory(q[:, :, at], k[:, :, at], v[:, :, at], *gates, state, chunk=1)
        for new, old in zip(after.weights, state.weights, strict=True):
            torch.testing.assert_close(new, (1 - alpha[..., t, None, None]) * old, atol=1e-14, rtol=0)
        state = after


@pytest.mark.parametrize(("forgets", "order"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("depth", [1, 2])
def test_chunks_come_near_the_sequential_rule_as_theta_shrinks(depth: int, forgets: bool, order: int) -> None:
    given, weights, gaps = tensors(32, theta=1.0), net(depth), []
    for size in (0.02, 0.01, 0.005, 0.0025):
        scaled = [*given[:3], size * given[3], given[4], given[5] * forgets]
        gaps.append(float((run(scaled, weights, 16) - run(scaled, weights, 1)).abs().max()))
    assert gaps[0] > 1e-4
    assert all(small < 0.6 * large for large, small in itertools.pairwise(gaps)), gaps
    assert exponent([1, 2, 4, 8], gaps[::-1]) > 0.9 * order


@pytest.mark.parametrize("sizes", [[1] * 21, [3, 4, 0, 9, 5]])
def test_pieces_equal_the_whole_whatever_they_cut(sizes: list[int]) -> None:
    given, weights = tensors(21), net(2)
    state, rows, at = sc.nn.MemoryState.of(weights), [], 0
    for n in sizes:
        out, state = sc.nn.neural_memory(*(x[:, :, at : at + n] for x in given), state, 4)
        rows.append(out)
        at += n
    torch.testing.assert_close(torch.cat(rows, 2), run(given, weights, 4), atol=1e-12, rtol=0)
    assert state.length == 21


def made(kind: str, dim: int = 8, depth: int = 2, near: int = 4) -> nn.Module:
    if kind == "memory":
        return sc.nn.NeuralMemory(dim, 2, depth=depth, chunk=near)
    if kind == "context":
        return sc.nn.MemoryAsContext(dim, 2, segment=near, depth=depth)
    kinds = {"gate": sc.nn.MemoryAsGate, "layer": sc.nn.MemoryAsLayer}
    return kinds[kind](dim, 2, window=near, depth=depth, chunk=near)


each_kind = pytest.mark.parametrize("kind", ["memory", "context", "gate", "layer"])


@each_kind
def test_steps_equal_the_whole_call_with_a_state_of_one_size(kind: str) -> None:
    layer, x = made(kind).double(), torch.randn(2, 45, 8, dtype=torch.float64)
    want = layer(x)
    for sizes in ([1] * 45, [1, 3, 20, 0, 2, 18, 1]):
        state, rows = layer.init_state(2), []
        for piece in x.split(sizes, 1):
            y, state = layer.step(piece, state)
            rows.append(y)
            if kind != "memory":
                assert state.attention.tensors["k"].shape[2] <= 16 + max(sizes)
        torch.testing.assert_close(torch.cat(rows, 1), want, atol=1e-12, rtol=0)


@each_kind
def test_padding_and_later_tokens_are_not_read(kind: str) -> None:
    layer, x = made(kind).double(), torch.randn(2, 13, 8, dtype=torch.float64)
    whole, alone = layer(x), layer(x[1:, :7])
    torch.testing.assert_close(whole[1:, :7], alone, atol=1e-12, rtol=0)
    x[1, 7:] = math.nan
    padded = layer(x, key_lengths=torch.tensor([13, 7]))
    torch.testing.assert_close(padded[1:, :7], alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(padded[:1], whole[:1], atol=1e-12, rtol=0)
    assert torch.isfinite(padded).all()


@each_kind
def test_every_parameter_learns_and_work_grows_with_the_length(kind: str) -> None:
    layer, sizes = made(kind), [64, 128, 256]
    nn.init.normal_(layer.get_parameter("weights.1" if kind == "memory" else "memory.weights.1"), std=0.2)
    layer(torch.randn(2, 20, 8)).square().sum().backward()
    for name, p in layer.named_parameters():
        assert float(p.grad.abs().max()) > 0, name
    layer.requires_grad_(False)
    assert exponent(sizes, [flops(lambda n=n: layer(torch.zeros(1, n, 8))) for n in sizes]) <= 1.05
    assert layer(torch.zeros(2, 0, 8)).shape == (2, 0, 8)


def test_a_segment_reads_persistent_tokens_itself_and_what_was_known_before_it() -> None:
    """MAC by hand: softmax over persistent tokens, recalls and tokens up to the own one, in the second segment."""
    layer = made("context", depth=1).double()
    memory, attention = layer.memory, layer.attention
    nn.init.normal_(memory.weights[0])
    x, seen = torch.randn(1, 7, 8, dtype=torch.float64), layer.init_state(1)
    _, seen = layer.step(x[:, :4], seen)
    ask = F.normalize(layer.ask_proj(x[:, 4:]).unflatten(-1, (2, 4)).transpose(1, 2), dim=-1)
    recalled = memory.told(recall(seen.memory.memory.weights, ask))
    places = torch.stack((recalled, x[:, 4:]), 2).flatten(1, 2)[0]
    qkv = attention.qkv_proj(places).view(6, 3, 2, 4)
    kept = attention.qkv_proj(attention.persistent).view(4, 3, 2, 4)
    rates = 10000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)

    def turned(y: Tensor, at: int) -> Tensor:
        a, b = y[:2], y[2:]
        return torch.cat(
            (a * (at * rates).cos() - b * (at * rates).sin(), b * (at * rates).cos() + a * (at * rates).sin())
        )

    rows = []
    for i in range(1, 6, 2):
        heads = []
        for h in range(2):
            s = [qkv[i, 0, h] @ kept[p, 1, h] / 2 for p in range(4)]
            s += [turned(qkv[i, 0, h], i) @ turned(qkv[j, 1, h], j) / 2 for j in range(i + 1)]
            values = torch.cat((kept[:, 2, h], qkv[: i + 1, 2, h]))
            heads.append(torch.softmax(torch.stack(s), 0) @ values)
        rows.append(attention.out_proj(torch.cat(heads)))
    y = torch.stack(rows)[None]
    answers, _ = memory.step(y, seen.memory)
    torch.testing.assert_close(layer(x)[:, 4:], layer.gate(y, answers), atol=1e-12, rtol=0)


def test_bad_arguments_are_refused() -> None:
    (q, k, v, *gates), state = tensors(5), sc.nn.MemoryState.of(net(1))
    with pytest.raises(ValueError, match=r"q and k are \(B, H, n, m\)"):
        sc.nn.neural_memory(q, k[:, :, :4], v, *gates, state)
    with pytest.raises(ValueError, match=r"eta must be \(2, 2, 5\), got \(2, 2, 4\)"):
        sc.nn.neural_memory(q, k, v, gates[0], gates[1][..., :4], gates[2], state)
    with pytest.raises(ValueError, match=r"alpha must lie in 0..1, got 1.5 to 1.5; pass a sigmoid"):
        sc.nn.neural_memory(q, k, v, *gates[:2], torch.full_like(gates[2], 1.5), state)
    with pytest.raises(ValueError, match=r"theta must lie in 0..inf, got -1"):
        sc.nn.neural_memory(q, k, v, -torch.ones_like(gates[0]), *gates[1:], state)
    with pytest.raises(ValueError, match="a chunk has at least 1 token, got 0"):
        sc.nn.neural_memory(q, k, v, *gates, state, chunk=0)
    with pytest.raises(
        ValueError, match="must take 4 channels to 3 for 2 samples and 2 heads, got weights of no layer"
    ):
        sc.nn.neural_memory(q, k, v, *gates, sc.nn.MemoryState.of(()))
    with pytest.raises(ValueError, match="dim=9 must be a multiple of heads=2"):
        sc.nn.NeuralMemory(9, 2)
    with pytest.raises(ValueError, match="depth, hidden, chunk and taps must be at least 1"):
        sc.nn.NeuralMemory(8, depth=0)
    with pytest.raises(ValueError, match="a segment has at least 1 token, got 0"):
        sc.nn.MemoryAsContext(8, 2, segment=0)
    with pytest.raises(ValueError, match="persistent must be at least 0, got -1"):
        sc.nn.MemoryAsGate(8, 2, persistent=-1)
    with pytest.raises(ValueError, match="dim=8 must be a multiple of heads=3"):
        sc.nn.MemoryAsLayer(8, 3)


class Model(nn.Module):
    """One layer that mixes tokens, and a feed-forward one."""

    def __init__(self, mix: nn.Module, vocab: int, dim: int) -> None:
        super().__init__()
        self.embedding, self.mix, self.feed_forward = nn.Embedding(vocab, dim), mix, FeedForward(dim, 2)
        self.norms, self.out = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3)), nn.Linear(dim, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.mix(self.norms[0](x))
        return self.out(self.norms[2](x + self.feed_forward(self.norms[1](x))))


EASY, HARD = Recall(64, pairs=8, queries=16, keys=16, values=16), Recall(256, 32, 64, 64, 64)


def recalled(make: Callable[[], nn.Module], task: Recall, steps: int, more: int = 0, seed: int = 0) -> float:
    """Accuracy of one layer, 64 wide, after few pairs, then 8 pairs in 64 tokens, then `more` steps of the task itself."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Model(make(), task.vocab, 64)
    short = Recall(64, 8, 16 if task == EASY else 32, task.keys, task.values)

    def loss(step: int) -> Tensor:
        first = step < steps
        tokens, targets = (
            short.batch(32, generator, pairs=max(1, min(8, 16 * step // steps)))
            if first
            else task.batch(8, generator)
        )
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps + more, 1e-2)
    tokens, targets = task.batch(50, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_a_memory_recalls_what_a_window_cannot_see() -> None:
    assert recalled(lambda: sc.nn.NeuralMemory(64), EASY, 400) >= 0.9
    assert recalled(lambda: sc.nn.Attention(64, 1, "rope + window(8)"), EASY, 100) <= 1.6 * EASY.chance


@pytest.mark.slow
def test_the_gate_takes_from_the_memory_what_the_window_misses() -> None:
    assert recalled(lambda: sc.nn.MemoryAsGate(64, 1, window=8), EASY, 400) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "least"), [(1, 0.9), (2, 0.75)])
def test_thirty_two_pairs_in_256_tokens(depth: int, least: float) -> None:
    assert recalled(lambda: sc.nn.NeuralMemory(64, depth=depth), HARD, 800, 900) >= least


@pytest.mark.slow
def test_a_window_alone_guesses_among_thirty_two_pairs() -> None:
    near = recalled(lambda: sc.nn.Attention(64, 1, "rope + window(32)"), HARD, 100, 200)
    assert near <= 1.6 * HARD.chance
