"""Stacks in the place of attention weights: one that superposes pushes, and a weighted pushdown automaton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.nn.padding import without_padding


def superposition_stack(actions: Tensor, v: Tensor, stack: Tensor) -> tuple[Tensor, Tensor]:
    """S_t[i] = push S_{t-1}[i - 1] + noop S_{t-1}[i] + pop S_{t-1}[i + 1], S[-1] the vector v_t; the tops (B, n, m), and the stack.

    actions (B, n, 3) are shares of push, noop and pop, v (B, n, m), the stack (B, depth, m) with its top first; what is
    pushed below its depth is lost. (Joulin and Mikolov, Inferring Algorithmic Patterns with Stack-Augmented Recurrent Nets,
    2015; DuSell and Chiang, Stack Attention, 2024.)
    """
    if actions.shape != (*v.shape[:2], 3) or stack.dim() != 3 or stack[:, 0].shape != v[:, 0].shape:
        raise ValueError(
            f"superposition_stack: actions are (B, n, 3), v (B, n, m) and the stack (B, depth, m); got {tuple(actions.shape)}, "
            f"{tuple(v.shape)} and {tuple(stack.shape)}"
        )
    tops, below = [], torch.zeros_like(stack[:, :1])
    for t in range(v.shape[1]):
        push, noop, pop = actions[:, t].unsqueeze(-1).unsqueeze(-1).unbind(1)
        up, down = torch.cat((v[:, t : t + 1], stack[:, :-1]), 1), torch.cat((stack[:, 1:], below), 1)
        stack = push * up + noop * stack + pop * down
        tops.append(stack[:, 0])
    return torch.stack(tops, 1) if tops else v, stack


class StackAttention(nn.Module):
    """A layer that reads the top of a superposition stack: x (B, n, dim) to (B, n, dim).

    Each token brings shares of push, noop and pop, a softmax, and a vector of `size` sigmoids to push; its answer is a linear
    map of the top after it. The stack is as deep as the input is long, or `depth`, which makes work linear and the state
    constant. (DuSell and Chiang, Stack Attention: Improving the Ability of Transformers to Model Hierarchical Patterns, 2024.)

    >>> StackAttention(32)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(self, dim: int, size: int | None = None, *, depth: int | None = None) -> None:
        super().__init__()
        size = dim if size is None else size
        if min(dim, size) < 1 or (depth is not None and depth < 1):
            raise ValueError(
                f"dim, size and depth must be at least 1, got dim={dim}, size={size}, depth={depth}"
            )
        self.depth = depth
        self.action_proj, self.value_proj = nn.Linear(dim, 3), nn.Linear(dim, size)
        self.out_proj = nn.Linear(size, dim, bias=False)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The features read; later tokens than `key_lengths` (B,) are padding."""
        return self.step(without_padding(x, key_lengths), self.init_state(len(x)))[0]

    def init_state(self, batch: int) -> Tensor:
        """The stack before the first token, (B, depth or 0, size)."""
        return self.value_proj.weight.new_zeros(batch, self.depth or 0, len(self.value_proj.weight))

    def step(self, x: Tensor, stack: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens x (B, n, dim), usually one, and the stack before them, to their features and the stack after."""
        if self.depth is None:
            stack = nn.functional.pad(stack, (0, 0, 0, x.shape[1]))
        actions, v = self.action_proj(x).softmax(-1), self.value_proj(x).sigmoid()
        if not x.shape[1]:
            return x, stack
        tops, stack = superposition_stack(actions, v, stack)
        return self.out_proj(tops), stack


Transitions = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PushdownState:
    """Weights of runs of the automaton, each token's divided by their sum.

    `inner` (B, t, t, Q, G, Q, G): of runs from state q and top x after token i - 1 to state r with y one above that x after
    token k, for places i and k; place 0 of i holds those that start below the bottom. `vectors` is the same times the vector
    of y, (..., m). `forward` (B, t + 1, Q, G): of all runs to a state and a top, in the places of i.
    """

    inner: Tensor
    vectors: Tensor
    forward: Tensor

    @classmethod
    def of(cls, bottom: Tensor, states: int, symbols: int) -> PushdownState:
        """State 0 over a stack of one symbol 0 with the vectors `bottom` (B, m), before the first token."""
        inner = bottom.new_zeros(len(bottom), 1, 1, states, symbols, states, symbols)
        inner[..., 0, 0, 0, 0] = 1
        forward = inner[:, :, 0, 0, 0].expand(-1, 2, -1, -1)
        return cls(inner, inner.unsqueeze(-1) * bottom[:, None, None, None, None, None, None], forward)

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.inner.shape[2] - 1


def pushdown_stack(weights: Transitions, v: Tensor, state: PushdownState) -> tuple[Tensor, PushdownState]:
    """The expected vector of each state and top symbol over all runs of a pushdown automaton, (B, n, Q, G, m), and the state.

    Token t moves from state q with top x to r: it pushes y with the vector v_t, weight push (B, n, Q, G, Q, G), writes y over x
    and keeps the vector, weight replace (B, n, Q, G, Q, G), or pops, weight pop (B, n, Q, G, Q); the bottom is never popped.
    Weights are positive; only their ratios inside a token count. O(n^3) time, O(n^2) memory. (DuSell and Chiang, The Surprising
    Computational Power of Nondeterministic Stack RNNs, 2023: vector version; Stack Attention, 2024.)
    """
    push, replace, pop = weights
    (q, g), ends = state.inner.shape[3:5], (len(v), v.shape[1])
    wanted = [(*ends, q, g, q, g), (*ends, q, g, q, g), (*ends, q, g, q)]
    if [tuple(w.shape) for w in weights] != wanted or state.vectors.shape[-1] != v.shape[-1]:
        raise ValueError(
            f"pushdown_stack: for {q} states, {g} symbols and v {tuple(v.shape)} push, replace and pop are "
            f"{', '.join(map(str, wanted))} and vectors as wide as v; got {', '.join(str(tuple(w.shape)) for w in weights)} "
            f"and vectors of {state.vectors.shape[-1]}"
        )
    reads = []
    for t in range(v.shape[1]):
        read, state = _transition(push[:, t], replace[:, t], pop[:, t], v[:, t], state)
        reads.append(read)
    return torch.stack(reads, 1) if reads else v.new_zeros(*ends, q, g, v.shape[-1]), state


def _transition(
    push: Tensor, replace: Tensor, pop: Tensor, v: Tensor, state: PushdownState
) -> tuple[Tensor, PushdownState]:
    inner, vectors, forward = state.inner, state.vectors, state.forward
    last = inner[:, :, -1]
    popped = torch.einsum("biqxsz,bszr->biqxr", last, pop)[:, 1:]
    column = torch.einsum("biqxsz,bszry->biqxry", last, replace)
    column = column + torch.einsum("bikqxuy,bkuyr->biqxry", inner[:, :, :-1], popped)
    carried = torch.einsum("biqxszm,bszry->biqxrym", vectors[:, :, -1], replace)
    carried = carried + torch.einsum("bikqxuym,bkuyr->biqxrym", vectors[:, :, :-1], popped)
    column = torch.cat((column, push.unsqueeze(1)), 1)
    carried = torch.cat((carried, (push.unsqueeze(-1) * v[:, None, None, None, None]).unsqueeze(1)), 1)
    reached = torch.einsum("biqx,biqxry->bry", forward, column)
    total = reached.sum((1, 2))
    read = torch.einsum("biqx,biqxrym->brym", forward, carried) / total[:, None, None, None]
    scale = 1 / total.detach()
    column, carried = (y * scale.view(-1, *[1] * (y.dim() - 1)) for y in (column, carried))
    after = PushdownState(
        _grown(inner, column),
        _grown(vectors, carried),
        torch.cat((forward, (reached * scale[:, None, None]).unsqueeze(1)), 1),
    )
    return read, after


def _grown(x: Tensor, column: Tensor) -> Tensor:
    """x (B, t, t, ...) with a row of zeros and then a column (B, t + 1, ...) more."""
    return torch.cat((torch.cat((x, torch.zeros_like(x[:, :1])), 1), column.unsqueeze(2)), 2)


class PushdownAttention(nn.Module):
    """A layer that reads the stack of a weighted pushdown automaton (dVPDA): x (B, n, dim) to (B, n, dim).

    Each token brings weights of all transitions between `states` states over `symbols` symbols, and a vector of `size`
    sigmoids to push; its answer is a linear map of the expected vectors by state and top. O(n^3): for short texts.
    (DuSell and Chiang, Stack Attention: Improving the Ability of Transformers to Model Hierarchical Patterns, 2024.)

    >>> PushdownAttention(32)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(self, dim: int, *, states: int = 2, symbols: int = 3, size: int = 5) -> None:
        super().__init__()
        if min(dim, states, symbols, size) < 1:
            raise ValueError(
                f"dim, states, symbols and size must be at least 1, got {dim}, {states}, {symbols} and {size}"
            )
        self.states, self.symbols = states, symbols
        self.action_proj = nn.Linear(dim, states * symbols * states * (2 * symbols + 1))
        self.value_proj, self.bottom = nn.Linear(dim, size), nn.Parameter(torch.zeros(size))
        self.out_proj = nn.Linear(states * symbols * size, dim, bias=False)

    def transitions(self, x: Tensor) -> Transitions:
        """Weights to push, replace and pop for tokens (B, n, dim); those of a token sum to one."""
        q, g = self.states, self.symbols
        w = self.action_proj(x).softmax(-1).unflatten(-1, (q, g, q, 2 * g + 1))
        return w[..., :g], w[..., g : 2 * g], w[..., 2 * g]

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The features read; later tokens than `key_lengths` (B,) are padding."""
        return self.step(without_padding(x, key_lengths), self.init_state(len(x)))[0]

    def init_state(self, batch: int) -> PushdownState:
        """The state before the first token."""
        return PushdownState.of(self.bottom.sigmoid().expand(batch, -1), self.states, self.symbols)

    def step(self, x: Tensor, state: PushdownState) -> tuple[Tensor, PushdownState]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their features and the state after."""
        read, state = pushdown_stack(self.transitions(x), self.value_proj(x).sigmoid(), state)
        return self.out_proj(read.flatten(2)), state
