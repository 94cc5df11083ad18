"""A small net whose weights are the state: every token is a step of gradient descent on what the net answers to its key."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, normalize, silu

from saccade.kernels.gated import paths
from saccade.nn.padding import without_padding

Weights = tuple[Tensor, ...]


@dataclass(frozen=True)
class MemoryState:
    """Weights (B, H, out, in) of each layer, their momentum, the weights where the chunk began, and the tokens seen."""

    weights: Weights
    momentum: Weights
    start: Weights
    length: int = 0

    @classmethod
    def of(cls, weights: Weights) -> MemoryState:
        """The state before the first token."""
        return cls(weights, tuple(torch.zeros_like(w) for w in weights), weights)


def recall(weights: Weights, q: Tensor) -> Tensor:
    """The net's answers (B, H, n, e) to q (B, H, n, m): linear maps with a SiLU between them."""
    return _inputs(weights, q)[0][-1]


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    state: MemoryState,
    chunk: int = 16,
) -> tuple[Tensor, MemoryState]:
    """S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2, M_t = (1 - alpha_t) M_{t-1} + S_t, out_t = M_t(q_t), and the state after.

    q, k (B, H, n, m), v and the answer (B, H, n, e), gates (B, H, n): theta at least 0, eta and alpha in 0..1. Gradients are taken
    at the weights where the chunk of `chunk` tokens began, so the chunk is part of the meaning; 1 is the sequential rule.
    They are rank one a token and written out: no weights a token are held, and training needs no graph inside a graph.
    (Behrouz et al., Titans: Learning to Memorize at Test Time, 2024.)
    """
    _check(q, k, v, (theta, eta, alpha), state, chunk)
    return _advance(q, k, v, theta, eta, alpha, state, chunk)


def _advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    state: MemoryState,
    chunk: int,
) -> tuple[Tensor, MemoryState]:
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens, outs, at = [x.to(wide) for x in (q, k, v, theta, eta, alpha)], [], 0
    while at < q.shape[2]:
        end = at + chunk - state.length % chunk
        out, state = _piece(state, *(x[:, :, at:end] for x in tokens))
        if state.length % chunk == 0:
            state = MemoryState(state.weights, state.momentum, state.weights, state.length)
        outs.append(out)
        at = end
    return (torch.cat(outs, 2) if outs else tokens[2]).to(v.dtype), state


def _inputs(weights: Weights, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into each layer and, last, what comes out; and each layer's product before its SiLU."""
    inputs, products = [x], []
    for n, w in enumerate(weights):
        products.append(inputs[-1] @ w.mT)
        inputs.append(products[-1] if n + 1 == len(weights) else silu(products[-1]))
    return inputs, products


def _gradients(weights: Weights, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each layer the factors (B, H, n, out) and (B, H, n, in) of every token's gradient of |M(k) - v|^2."""
    inputs, products = _inputs(weights, k)
    error, found = 2 * (inputs[-1] - v), []
    for n in range(len(weights) - 1, -1, -1):
        found.append((error, inputs[n]))
        if n:
            gate = products[n - 1].sigmoid()
            error = (error @ weights[n]) * gate * (1 + products[n - 1] * (1 - gate))
    return found[::-1]


def _piece(
    state: MemoryState, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor
) -> tuple[Tensor, MemoryState]:
    """Tokens of one chunk: what each wrote before reaches a later one through forgetting after momentum, (n, n) numbers."""
    tiny = torch.finfo(eta.dtype).tiny ** 0.5
    log_keep, log_eta = torch.log(1 - alpha + tiny), torch.log(eta + tiny)
    forget, drive = torch.exp(paths(log_keep)), torch.exp(paths(log_eta))
    written = -(forget @ drive) * theta.unsqueeze(-2)
    kept, driven = (torch.exp(x.cumsum(-1)).unsqueeze(-1) for x in (log_keep, log_eta))
    moved = forget @ driven
    last = -drive[..., -1, :] * theta
    h, weights, momentum = q, [], []
    layers = list(zip(state.weights, state.momentum, _gradients(state.start, k, v), strict=True))
    for n, (w, s, (error, given)) in enumerate(layers):
        answer = kept * (h @ w.mT) + moved * (h @ s.mT) + (written * (h @ given.mT)) @ error
        h = answer if n + 1 == len(layers) else silu(answer)
        weights.append(
            kept[..., -1:, :] * w
            + moved[..., -1:, :] * s
            + (error * written[..., -1, :].unsqueeze(-1)).mT @ given
        )
        momentum.append(driven[..., -1:, :] * s + (error * last.unsqueeze(-1)).mT @ given)
    return h, MemoryState(tuple(weights), tuple(momentum), state.start, state.length + q.shape[2])


def _check(
    q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: MemoryState, chunk: int
) -> None:
    if q.dim() != 4 or q.shape != k.shape or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"neural_memory: q and k are (B, H, n, m) and v (B, H, n, e); got q, k, v {shapes}")
    for name, x in zip(("theta", "eta", "alpha"), gates, strict=True):
        if x.shape != q.shape[:3]:
            raise ValueError(f"neural_memory: {name} must be {tuple(q.shape[:3])}, got {tuple(x.shape)}")
        most = math.inf if name == "theta" else 1.0
        if bool(((x < 0) | (x > most)).any()):
            raise ValueError(
                f"neural_memory: {name} must lie in 0..{most:g}, got {float(x.min()):g} to {float(x.max()):g}; pass a sigmoid"
            )
    if chunk < 1:
        raise ValueError(f"neural_memory: a chunk has at least 1 token, got {chunk}")
    w = state.weights
    ends = (*q.shape[:2], v.shape[-1], q.shape[-1])
    if not w or (*w[0].shape[:2], w[-1].shape[-2], w[0].shape[-1]) != ends:
        raise ValueError(
            f"neural_memory: the net must take {ends[3]} channels to {ends[2]} for {ends[0]} samples and {ends[1]} heads, "
            f"got weights {', '.join(str(tuple(x.shape)) for x in w) or 'of no layer'}"
        )


@dataclass(frozen=True)
class NeuralMemoryState:
    """What a layer keeps: the net, and the last projections that its short convolution looks back at."""

    memory: MemoryState
    tail: Tensor


class NeuralMemory(nn.Module):
    """A layer around `neural_memory`: x (B, n, dim) to what a net of `depth` layers a head, trained on the way, answers.

    Queries, keys and values are SiLUs of a causal convolution of `taps` tokens over projections, queries and keys of length
    one; eta and alpha are sigmoids of the token, and theta is a sigmoid over the chunk, so that a chunk of one key does not
    overshoot in a linear net. The net starts from learned weights, answering zero at first. (Behrouz et al., Titans: Learning
    to Memorize at Test Time, 2024.)

    >>> NeuralMemory(32, heads=4)(torch.zeros(1, 10, 32)).shape
    torch.Size([1, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        depth: int = 1,
        hidden: int | None = None,
        chunk: int = 16,
        taps: int = 4,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        if min(depth, chunk, taps) < 1 or (hidden is not None and hidden < 1):
            raise ValueError(
                f"depth, hidden, chunk and taps must be at least 1, got {depth}, {hidden}, {chunk} and {taps}"
            )
        self.heads, self.chunk, self.taps, size = heads, chunk, taps, dim // heads
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.filters = nn.Parameter(torch.randn(3 * dim, taps) / taps)
        self.gates = nn.Linear(dim, 3 * heads)
        with torch.no_grad():
            self.gates.bias.copy_(torch.tensor([0.0, -2.0, -6.0]).repeat_interleave(heads))
        sizes = [size] + [hidden or 2 * size] * (depth - 1) + [size]
        shapes = [(heads, sizes[n + 1], sizes[n]) for n in range(depth)]
        self.weights = nn.ParameterList(
            torch.zeros(s) if n + 1 == depth else torch.randn(s) * s[2] ** -0.5 for n, s in enumerate(shapes)
        )
        self.norm = nn.RMSNorm(size)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """The answers; later tokens than `key_lengths` (B,) are padding."""
        return self.step(without_padding(x, key_lengths), self.init_state(len(x)))[0]

    def init_state(self, batch: int) -> NeuralMemoryState:
        """The state before the first token."""
        wide = torch.promote_types(self.filters.dtype, torch.float32)
        weights = tuple(w.to(wide).expand(batch, -1, -1, -1) for w in self.weights)
        return NeuralMemoryState(
            MemoryState.of(weights), self.filters.new_zeros(batch, self.taps - 1, len(self.filters))
        )

    def step(self, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
        """New tokens x (B, n, dim), usually one, and the state before them, to their answers and the state after."""
        before = torch.cat((state.tail, self.qkv_proj(x)), 1)
        tail = before[:, before.shape[1] - self.taps + 1 :]
        if not x.shape[1]:
            return x, state
        mixed = silu(conv1d(before.mT, self.filters.unsqueeze(1), groups=len(self.filters)).mT)
        q, k, v = mixed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        theta, eta, alpha = self.gates(x).sigmoid().unflatten(-1, (3, self.heads)).permute(2, 0, 3, 1)
        q, k, theta = normalize(q, dim=-1), normalize(k, dim=-1), theta / self.chunk
        out, memory = _advance(q, k, v, theta, eta, alpha, state.memory, self.chunk)
        return self.told(out), NeuralMemoryState(memory, tail)

    def told(self, answers: Tensor) -> Tensor:
        """Answers (B, H, n, size) as features (B, n, dim)."""
        return self.out_proj(self.norm(answers).transpose(1, 2).flatten(2))
