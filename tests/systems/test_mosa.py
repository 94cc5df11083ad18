"""S195, MoSA: each head's router takes its best tokens, which attend among themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import saccade as sc
from saccade.nn import mosa
from saccade.nn.transformer import FeedForward
from saccade.tasks.text import VOCAB, load
from systems.helpers import below, dense, flops, text_loss, train_on_text

pytestmark = pytest.mark.system("S195")


def layer(top: int, sparse: int = 3, dense: int = 0, keep_first: bool = True, dim: int = 12) -> sc.nn.MoSA:
    torch.manual_seed(0)
    return sc.nn.MoSA(dim, top=top, sparse=sparse, dense=dense, head_dim=4, keep_first=keep_first).double()


def tokens(n: int, batch: int = 2, dim: int = 12) -> Tensor:
    return torch.randn(batch, n, dim, dtype=torch.float64)


def rotated(x: Tensor, at: int) -> Tensor:
    """Rope of one vector at a position."""
    half = len(x) // 2
    angle = at * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))


def best(scores: list[float], top: int, keep_first: bool) -> list[int]:
    """The `top` best, the earlier of equals, in order of position."""
    order = sorted(range(len(scores)), key=lambda t: (not (keep_first and t == 0), -scores[t], t))
    return sorted(order[:top])


def written_out(m: sc.nn.MoSA, x: Tensor, running: bool = False) -> Tensor:
    """Token by token: all heads see all tokens, and a mask says who was chosen."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for h in range(m.sparse):
            r = [torch.sigmoid(x[b, t] @ m.router.weight[h]) for t in range(x.shape[1])]
            q, k, v = ([x[b, t] @ w for t in range(x.shape[1])] for w in m.qkv_proj[h].chunk(3, -1))
            scores = [float(y.detach()) for y in r]
            for i in range(x.shape[1]):
                taken = best(scores[: i + 1] if running else scores, m.top, m.keep_first)
                if i not in taken:
                    continue
                near = [j for j in taken if j <= i]
                s = torch.stack([rotated(q[i], i) @ rotated(k[j], j) for j in near]) / math.sqrt(m.size)
                mixed = (torch.softmax(s, 0).unsqueeze(-1) * torch.stack([v[j] for j in near])).sum(0)
                out[b, i] = out[b, i] + r[i] * (mixed @ m.out_proj[h])
    return out


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("keep_first", [False, True])
@pytest.mark.parametrize(("n", "top"), [(1, 3), (9, 1), (13, 4), (7, 20)])
def test_gathered_tokens_equal_the_mask_and_its_gradients(
    n: int, top: int, keep_first: bool, running: bool
) -> None:
    m, x = layer(top, keep_first=keep_first), tokens(n).requires_grad_()
    found, truth = m(x, running=running), written_out(m, x, running)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    wanted = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (found, truth)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("running", [False, True])
def test_all_tokens_with_an_open_gate_are_dense_heads(running: bool) -> None:
    m, x = layer(top=40), tokens(30)
    x[..., 0] = 1
    m.router.weight.data.zero_()[:, 0] = 60
    attention = sc.nn.Attention(12, 3, "causal + rope").double()
    q, k, v = m.qkv_proj.detach().chunk(3, -1)
    for linear, weight in ((attention.query_proj, q), (attention.key_proj, k), (attention.value_proj, v)):
        linear.weight.data = weight.transpose(1, 2).reshape(12, 12)
    attention.out_proj.weight.data = m.out_proj.detach().reshape(12, 12).T
    torch.testing.assert_close(m(x, running=running), attention(x), atol=1e-10, rtol=0)


def test_dense_heads_add_to_the_sparse_ones() -> None:
    m, x = layer(top=5, dense=2), tokens(20)
    attention = m.dense
    assert attention is not None
    q, k, v = attention.project(x)
    q, k = (
        torch.stack(
            [
                torch.stack([torch.stack([rotated(y[b, h, t], t) for t in range(20)]) for h in range(2)])
                for b in range(2)
            ]
        )
        for y in (q, k)
    )
    whole = attention.out_proj(dense(q, k, v, below(20)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x), written_out(m, x) + whole, atol=1e-12, rtol=0)


def test_work_is_a_term_of_the_chosen_tokens_and_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {}
    for n in (256, 512, 1024):
        m, x = sc.nn.MoSA(32, top=64, sparse=3, dense=0, head_dim=16), torch.randn(1, n, 32)
        counted[n] = flops(lambda m=m, x=x: m(x))
        assert counted[n] == 3 * (
            2 * n * 32 + 2 * 64 * 32 * 4 * 16
        )  # the router of all, projections of the chosen
    assert counted[1024] - counted[512] == 2 * (counted[512] - counted[256])
    pairs: list[tuple[int, ...]] = []
    monkeypatch.setattr(mosa, "attend", lambda q, k, v, *_, **__: pairs.append((q.shape[2], k.shape[2])) or v)
    for n in (256, 1024):
        sc.nn.MoSA(32, top=64, sparse=3, dense=0, head_dim=16)(torch.randn(1, n, 32))
    assert pairs == [(64, 64), (64, 64)]


def test_padding_reaches_nothing() -> None:
    m, x = layer(top=6, dense=1), tokens(17, batch=3)
    lengths = torch.tensor([17, 9, 4])
    poisoned = x.clone()
    for b, n in enumerate(lengths):
        poisoned[b, n:] = math.nan
    for running in (False, True):
        found = m(poisoned, key_lengths=lengths, running=running)
        for b, n in enumerate(lengths.tolist()):
            torch.testing.assert_close(
                found[b, :n], m(x[b : b + 1, :n], running=running)[0], atol=1e-12, rtol=0
            )
            assert (found[b, n:] == 0).all()


def test_the_choice_leaks_and_the_running_choice_does_not() -> None:
    m, x = layer(top=4, dense=1), tokens(24)
    assert m.causality == "leak"
    moved = torch.cat((x[:, :15], 3 * torch.randn_like(x[:, 15:])), 1)
    assert (m(moved) - m(x))[:, :15].abs().max() > 1e-3
    torch.testing.assert_close(m(moved, running=True)[:, :15], m(x, running=True)[:, :15], atol=1e-12, rtol=0)
    _, ranked = m.scores(x)
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, m.choose(ranked), True)
    assert torch.equal(m.alive(ranked)[..., -1, :], chosen)


def decoded(m: sc.nn.MoSA, x: Tensor) -> tuple[Tensor, sc.nn.MoSAState]:
    state, outs = m.init_state(len(x)), []
    for t in range(x.shape[1]):
        y, state = m.step(x[:, t : t + 1], state)
        outs.append(y)
    return torch.cat(outs, 1), state


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("keep_first", [False, True])
def test_decoding_is_the_running_choice_with_few_keys(dense: int, keep_first: bool) -> None:
    m, x = layer(top=4, dense=dense, keep_first=keep_first), tokens(19)
    out, state = decoded(m, x)
    torch.testing.assert_close(out, m(x, running=True), atol=1e-12, rtol=0)
    assert state.k.shape == state.v.shape == (2, 3, 4, 4)
    assert state.scores.shape == (2, 3, 4)
    own = 2 * 3 * 4 * (2 * 4 + 1) * 8
    assert state.nbytes == own + (0 if state.dense is None else state.dense.nbytes)


def test_equal_scores_go_to_the_earlier_token() -> None:
    m, x = layer(top=4, keep_first=False), tokens(19)
    m.router.weight.data.zero_()
    _, ranked = m.scores(x)
    assert (m.choose(ranked) == torch.arange(4)).all()
    torch.testing.assert_close(decoded(m, x)[0], m(x), atol=1e-12, rtol=0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"top and sparse must be at least 1 .* top=0, sparse=3"):
        sc.nn.MoSA(12, top=0, sparse=3)
    with pytest.raises(ValueError, match="12 is not divisible by 5 heads; give head_dim"):
        sc.nn.MoSA(12, top=2, sparse=4)
    with pytest.raises(ValueError, match="head_dim must be even, got 3"):
        sc.nn.MoSA(12, top=2, sparse=3)
    with pytest.raises(ValueError, match="a step takes one token, got 2"):
        layer(2).step(tokens(2), layer(2).init_state(2))


class Bytes(nn.Module):
    """A language model of bytes around any causal layers."""

    def __init__(self, dim: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.read = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.mix = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * len(layers)))
        self.feed = nn.ModuleList(FeedForward(dim, 2) for _ in layers)
        self.running = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for n, (mix, feed) in enumerate(zip(self.mix, self.feed, strict=True)):
            options = {"running": self.running} if isinstance(mix, sc.nn.MoSA) else {}
            x = x + mix(self.norms[2 * n](x), **options)
            x = x + feed(self.norms[2 * n + 1](x))
        return self.read(x)


def budget(attention: nn.Module, heads: int, sparse: int = 0) -> int:
    """FLOPs of a layer on 128 tokens; the counter does not see the pairs of a fused kernel, which the plan tells."""
    pairs = sc.plan("causal", (1, heads, 128, 16)).cost.flops
    if sparse:
        pairs += sc.plan("causal", (1, sparse, 16, 16)).cost.flops
    return pairs + flops(lambda: attention(torch.randn(1, 128, 64)))


def losses(depth: int, steps: int, seed: int) -> tuple[float, float, float]:
    """Held-out nats a byte of four dense heads, of one and 30 sparse heads at the same FLOPs, and of these by running choice."""
    corpus, found = load(window=128), []
    for sparse in (0, 30):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [
            sc.nn.MoSA(64, top=16, sparse=sparse, head_dim=16)
            if sparse
            else sc.nn.Attention(64, 4, "causal + rope")
            for _ in range(depth)
        ]
        model = Bytes(64, layers)
        train_on_text(model, corpus, steps, 128, seed=seed)
        found.append(text_loss(model, corpus, 128, 64))
    model.running = True
    return found[0], found[1], text_loss(model, corpus, 128, 64)


def test_thirty_sparse_heads_cost_what_three_dense_heads_do() -> None:
    four = budget(sc.nn.Attention(64, 4, "causal + rope"), 4)
    mixed = budget(sc.nn.MoSA(64, top=16, sparse=30, head_dim=16), 1, 30)
    assert 0.95 < mixed / four <= 1


def test_at_equal_work_text_is_learned_as_well_as_by_dense_heads() -> None:
    whole, chosen, running = losses(depth=1, steps=120, seed=0)
    assert whole < 2.75
    assert chosen <= 1.03 * whole
    assert chosen <= running <= 1.06 * whole


@pytest.mark.slow
def test_longer_training_of_two_layers_leaves_it_behind_dense_heads() -> None:
    whole, chosen, running = losses(depth=2, steps=400, seed=0)
    assert whole < 2.1
    assert 1.03 * whole < chosen < 1.12 * whole
    assert chosen < running < 1.16 * whole
