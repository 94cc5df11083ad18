"""S182, stack attention: the top of a stack in superposition, and of all runs of a pushdown automaton."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import FeedForward
from saccade.tasks.copy import Copy
from saccade.tasks.dyck import Dyck
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import exponent, train

pytestmark = pytest.mark.system("S182")


def test_hard_actions_are_a_list_for_a_thousand_random_traces() -> None:
    rng = random.Random(0)
    moves = torch.tensor([[rng.randrange(3) for _ in range(30)] for _ in range(1000)])
    v = torch.randn(1000, 30, 2, dtype=torch.float64)
    tops, stack = sc.nn.superposition_stack(
        F.one_hot(moves, 3).double(), v, torch.zeros(1000, 30, 2, dtype=torch.float64)
    )
    for b in range(1000):
        kept: list[Tensor] = []
        for t in range(30):
            if moves[b, t] == 0:
                kept.append(v[b, t])
            elif moves[b, t] == 2 and kept:
                kept.pop()
            want = kept[-1] if kept else torch.zeros(2, dtype=torch.float64)
            assert torch.equal(tops[b, t], want)
        for depth, x in enumerate(reversed(kept)):
            assert torch.equal(stack[b, depth], x)
        assert not stack[b, len(kept) :].any()


def test_soft_actions_mix_the_cells_as_written() -> None:
    actions = torch.rand(2, 9, 3, dtype=torch.float64).softmax(-1)
    v = torch.randn(2, 9, 4, dtype=torch.float64)
    tops, stack = sc.nn.superposition_stack(actions, v, torch.zeros(2, 5, 4, dtype=torch.float64))
    for b in range(2):
        cells = [torch.zeros(4, dtype=torch.float64) for _ in range(5)]
        for t in range(9):
            push, noop, pop = actions[b, t]
            cells = [
                push * (cells[i - 1] if i else v[b, t])
                + noop * cells[i]
                + pop * (cells[i + 1] if i < 4 else 0)
                for i in range(5)
            ]
            torch.testing.assert_close(tops[b, t], cells[0], atol=1e-14, rtol=0)
        torch.testing.assert_close(stack[b], torch.stack(cells), atol=1e-14, rtol=0)


def test_gradients_agree_with_finite_differences() -> None:
    actions, v, stack = (torch.randn(2, 5, n, dtype=torch.float64).requires_grad_() for n in (3, 2, 2))
    assert torch.autograd.gradcheck(
        lambda a, v, s: sc.nn.superposition_stack(a.softmax(-1), v, s), (actions, v, stack)
    )
    q, g = 2, 2
    raw = torch.randn(1, 4, q * g * q * (2 * g + 1), dtype=torch.float64).requires_grad_()
    v, bottom = (torch.randn(1, *n, dtype=torch.float64).requires_grad_() for n in ((4, 2), (2,)))

    def read(raw: Tensor, v: Tensor, bottom: Tensor) -> Tensor:
        w = raw.exp().unflatten(-1, (q, g, q, 2 * g + 1))
        state = sc.nn.PushdownState.of(bottom, q, g)
        return sc.nn.pushdown_stack((w[..., :g], w[..., g : 2 * g], w[..., 2 * g]), v, state)[0]

    assert torch.autograd.gradcheck(read, (raw, v, bottom))


def by_enumeration(push: Tensor, replace: Tensor, pop: Tensor, v: Tensor, bottom: Tensor) -> Tensor:
    """Every run of one sample, stacks as tuples of (symbol, which vector): expected vectors (n, Q, G, m) by state and top."""
    states, symbols = push.shape[1:3]
    vectors = torch.cat((bottom[None], v))
    runs: list[tuple[float, int, tuple[tuple[int, int], ...]]] = [(1.0, 0, ((0, 0),))]
    rows = []
    for t in range(len(v)):
        after = []
        for weight, q, stack in runs:
            x, which = stack[-1]
            for r in range(states):
                for y in range(symbols):
                    after.append((weight * float(push[t, q, x, r, y]), r, (*stack, (y, t + 1))))
                    after.append((weight * float(replace[t, q, x, r, y]), r, (*stack[:-1], (y, which))))
                if len(stack) > 1:
                    after.append((weight * float(pop[t, q, x, r]), r, stack[:-1]))
        runs, total = after, sum(w for w, _, _ in after)
        read = torch.zeros(states, symbols, v.shape[-1], dtype=v.dtype)
        for weight, q, stack in runs:
            read[q, stack[-1][0]] += weight / total * vectors[stack[-1][1]]
        rows.append(read)
        merged: dict[tuple[int, tuple[tuple[int, int], ...]], float] = {}
        for weight, q, stack in runs:
            merged[q, stack] = merged.get((q, stack), 0.0) + weight
        runs = [(w, q, stack) for (q, stack), w in merged.items()]
    return torch.stack(rows)


@pytest.mark.parametrize(("states", "symbols", "n"), [(1, 1, 6), (1, 2, 6), (2, 2, 6), (2, 3, 4)])
def test_marginals_over_all_runs_equal_their_enumeration(states: int, symbols: int, n: int) -> None:
    push, replace = torch.rand(2, 2, n, states, symbols, states, symbols, dtype=torch.float64)
    pop = 2 * torch.rand(2, n, states, symbols, states, dtype=torch.float64)
    v, bottom = torch.randn(2, n, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    read, state = sc.nn.pushdown_stack(
        (push, replace, pop), v, sc.nn.PushdownState.of(bottom, states, symbols)
    )
    for b in range(2):
        want = by_enumeration(push[b], replace[b], pop[b], v[b], bottom[b])
        torch.testing.assert_close(read[b], want, atol=1e-10, rtol=0)
    assert state.length == n
    torch.testing.assert_close(state.forward.sum((2, 3)), torch.ones(2, n + 2, dtype=torch.float64))


def test_an_automaton_of_certain_moves_is_a_list() -> None:
    rng = random.Random(1)
    for _ in range(20):
        moves = torch.tensor([[rng.randrange(3) for _ in range(12)]])
        v = torch.randn(1, 12, 2, dtype=torch.float64)
        hard = F.one_hot(moves, 3).double()
        push, stay, pop = (hard[..., n].view(1, 12, 1, 1, 1, 1) for n in range(3))
        kept, want, held = [torch.zeros(2, dtype=torch.float64)], [], []
        for t in range(12):
            if moves[0, t] == 0:
                kept.append(v[0, t])
            elif moves[0, t] == 2:
                if len(kept) == 1:  # the bottom is never popped: stay instead
                    pop[0, t], stay[0, t] = 0, 1
                else:
                    kept.pop()
            want.append(kept[-1])
            held.append(len(kept))
        start = sc.nn.PushdownState.of(torch.zeros(1, 2, dtype=torch.float64), 1, 1)
        read, _ = sc.nn.pushdown_stack((push, stay, pop.squeeze(-1)), v, start)
        torch.testing.assert_close(read[0, :, 0, 0], torch.stack(want), atol=1e-12, rtol=0)


def test_long_runs_of_far_apart_weights_stay_finite() -> None:
    layer = sc.nn.PushdownAttention(8, size=2)
    nn.init.normal_(layer.action_proj.weight, std=3)
    x = torch.randn(1, 50, 8)
    with torch.no_grad():
        found, truth = layer(x), layer.double()(x.double())
    torch.testing.assert_close(found.double(), truth, atol=1e-4, rtol=0)


def made(kind: str) -> nn.Module:
    if kind == "automaton":
        return sc.nn.PushdownAttention(6, size=3).double()
    return sc.nn.StackAttention(6, 4, depth=None if kind == "stack" else 5).double()


each_kind = pytest.mark.parametrize("kind", ["stack", "bounded", "automaton"])


@each_kind
def test_steps_equal_the_whole_call(kind: str) -> None:
    layer, x = made(kind), torch.randn(2, 13, 6, dtype=torch.float64)
    want = layer(x)
    for sizes in ([1] * 13, [3, 0, 6, 4]):
        state, rows = layer.init_state(2), []
        for piece in x.split(sizes, 1):
            y, state = layer.step(piece, state)
            rows.append(y)
        torch.testing.assert_close(torch.cat(rows, 1), want, atol=1e-12, rtol=0)
    if kind == "bounded":
        assert state.shape == (2, 5, 4)


@each_kind
def test_padding_and_later_tokens_are_not_read_and_all_learns(kind: str) -> None:
    layer, x = made(kind), torch.randn(2, 9, 6, dtype=torch.float64)
    whole, alone = layer(x), layer(x[1:, :5])
    torch.testing.assert_close(whole[1:, :5], alone, atol=1e-12, rtol=0)
    x[1, 5:] = math.nan
    padded = layer(x, key_lengths=torch.tensor([9, 5]))
    torch.testing.assert_close(padded[1:, :5], alone, atol=1e-12, rtol=0)
    assert torch.isfinite(padded).all()
    padded.square().sum().backward()
    for name, p in layer.named_parameters():
        assert float(p.grad.abs().max()) > 0, name
    assert layer(x[:, :0]).shape == (2, 0, 6)


def test_a_deep_enough_bound_changes_nothing() -> None:
    whole, bounded = made("stack"), sc.nn.StackAttention(6, 4, depth=9).double()
    bounded.load_state_dict(whole.state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(bounded(x), whole(x), atol=1e-12, rtol=0)


def test_what_the_automaton_holds_grows_with_the_square_of_the_length() -> None:
    layer, held = sc.nn.PushdownAttention(4, states=1, symbols=2, size=1), []
    for n in (8, 16, 32):
        with torch.no_grad():
            _, state = layer.step(torch.zeros(1, n, 4), layer.init_state(1))
        held.append(float(state.inner.numel()))
    assert 1.8 < exponent([8, 16, 32], held) < 2.05


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(
        ValueError, match="dim, size and depth must be at least 1, got dim=4, size=4, depth=0"
    ):
        sc.nn.StackAttention(4, depth=0)
    with pytest.raises(ValueError, match="dim, states, symbols and size must be at least 1"):
        sc.nn.PushdownAttention(4, states=0)
    with pytest.raises(ValueError, match=r"actions are \(B, n, 3\), v \(B, n, m\)"):
        sc.nn.superposition_stack(torch.zeros(1, 2, 2), torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))
    layer = sc.nn.PushdownAttention(4, states=1, symbols=1, size=2)
    push, replace, _ = layer.transitions(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"push, replace and pop are \(1, 3, 1, 1, 1, 1\)"):
        sc.nn.pushdown_stack((push, replace, push), torch.zeros(1, 3, 2), layer.init_state(1))


class Model(nn.Module):
    """Layers that mix tokens, each before a feed-forward one."""

    def __init__(self, vocab: int, *mixes: nn.Module, dim: int = 16) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.mixes, depth = nn.ModuleList(mixes), len(mixes)
        self.feed_forward = nn.ModuleList(FeedForward(dim, 2) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for n, mix in enumerate(self.mixes):
            x = x + mix(self.norms[2 * n](x))
            x = x + self.feed_forward[n](self.norms[2 * n + 1](x))
        return self.out(self.norms[-1](x))


def learned(
    model: nn.Module, short: list[Dyck | Copy], long: list[Dyck | Copy], steps: int, rate: float = 1e-2
) -> float:
    """The least accuracy on any of the long tasks after training on the short ones in turn."""
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        tokens, targets = short[step % len(short)].batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate)
    found = []
    for task in long:
        tokens, targets = task.batch(100, torch.Generator().manual_seed(1))
        with torch.no_grad():
            found.append(accuracy(model(tokens), targets))
    return min(found)


SHORT, LONG = [Dyck(n) for n in (8, 16, 24, 32, 40)], [Dyck(n) for n in (80, 100, 120)]


def test_brackets_of_two_kinds_at_three_times_the_trained_length() -> None:
    stack = Model(4, sc.nn.StackAttention(16, 8))
    assert learned(stack, SHORT, LONG, 400) >= 0.98
    transformer = sc.nn.Transformer(
        4, dim=32, depth=2, heads=2, mechanism="causal", positions="sinusoidal", max_length=120
    )
    assert learned(transformer, SHORT, LONG, 300, rate=3e-3) <= 0.9


def reversed_well(mix: nn.Module, steps: int) -> float:
    """Accuracy on w # w reversed, 16 symbols as in training, where moving averages tell one side of the mark from the other."""
    tasks: list[Dyck | Copy] = [Copy(n, symbols=4, reverse=True) for n in (2, 4, 6, 8, 12, 16)]
    return learned(Model(5, sc.nn.DampedEMA(32, 4), mix, dim=32), tasks, tasks[-1:], steps, rate=5e-3)


def test_marked_reversal() -> None:
    assert reversed_well(sc.nn.StackAttention(32, 16), 500) >= 0.95
    assert reversed_well(sc.nn.Attention(32, 2, "causal + rope"), 500) <= 0.85


def test_an_automaton_learns_brackets() -> None:
    model = Model(4, sc.nn.PushdownAttention(16, states=1, symbols=2, size=3))
    assert learned(model, [Dyck(8), Dyck(12)], [Dyck(24)], 120) >= 0.95
