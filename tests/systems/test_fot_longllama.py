"""S251, the Focused Transformer: a memory read by its best keys, trained among other documents' memories."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import FeedForward
from systems.helpers import FRESH, below, flops, train

pytestmark = pytest.mark.system("S251")
DIM, HEADS, WINDOW = 12, 3, 5


def layer(top: int | None = None, size: int | None = None) -> sc.nn.FocusedAttention:
    return sc.nn.FocusedAttention(DIM, HEADS, window=WINDOW, top=top, size=size).double()


def tokens(n: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.float64)


def rotated(x: Tensor, at: int) -> Tensor:
    """Rope of one vector at a position."""
    half = len(x) // 2
    angle = at * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))


def written_out(m: sc.nn.FocusedAttention, x: Tensor, documents: int | None = None) -> Tensor:
    """Query by query; the memory is a list of (sample, position)."""
    q, k, v = m.project(x)
    rows = []
    for b in range(len(x)):
        for i in range(x.shape[1]):
            start, heads = i // m.window * m.window, []
            if documents is None:
                memory = [(b, j) for j in range(start)][-(m.size or start + 1) :]
            else:
                others = [(b + n) % len(x) for n in range(documents)]
                memory = [(o, j) for o in others for j in range(max(0, start - m.window), start)]
            for h in range(HEADS):
                scores = {(o, j): q[b, h, i] @ k[o, h, j] for o, j in memory}
                best = sorted(scores, key=lambda at, s=scores: float(-s[at].detach()))[: m.top]
                near = {(b, j): rotated(q[b, h, i], i) @ rotated(k[b, h, j], j) for j in range(start, i + 1)}
                read = {at: scores[at] for at in best} | near
                w = torch.softmax(torch.stack(list(read.values())) / math.sqrt(q.shape[-1]), 0)
                heads.append(sum(w[n] * v[o, h, j] for n, (o, j) in enumerate(read)))
            rows.append(torch.cat(heads))
    return m.out_proj(torch.stack(rows).view(x.shape))


@pytest.mark.parametrize(("top", "size"), [(None, None), (3, None), (100, None), (None, 7), (2, 6)])
def test_equals_the_formula_and_its_gradients(top: int | None, size: int | None) -> None:
    m, x = layer(top, size), tokens(18).requires_grad_()
    found, truth = m(x), written_out(m, x)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    wanted = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (found, truth)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("top", [None, 4])
@pytest.mark.parametrize("documents", [1, 2, 3])
def test_crossbatch_equals_the_formula_and_reaches_other_documents(documents: int, top: int | None) -> None:
    m, x = layer(top), tokens(13, batch=3).requires_grad_()
    found, truth = m(x, documents=documents), written_out(m, x, documents)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), x, retain_graph=True) for y in (found, truth))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    own, following, last = torch.autograd.grad(found[0, WINDOW:].sum(), x)[0][:, :WINDOW].abs().amax((1, 2))
    assert own > 0
    assert (following > 0) == (documents > 1)
    assert (last > 0) == (documents > 2)


def test_all_of_the_memory_is_a_dense_softmax_over_the_concatenation() -> None:
    m, x = layer(top=10), tokens(15)
    q, k, v = m.project(x)
    turned_q, turned_k = (
        torch.stack([torch.stack([rotated(z, t) for t, z in enumerate(y)]) for y in x.flatten(0, 1)]).view_as(
            x
        )
        for x in (q, k)
    )
    start = torch.arange(15)[:, None] // WINDOW * WINDOW
    old = torch.arange(15) < start
    exist = torch.cat((old, below(15) & ~old), 1)
    s = torch.cat((q @ k.mT, turned_q @ turned_k.mT), -1) / math.sqrt(q.shape[-1])
    truth = torch.softmax(s.masked_fill(~exist, -math.inf), -1) @ torch.cat((v, v), 2)
    found = m(x)
    torch.testing.assert_close(found, m.out_proj(truth.transpose(1, 2).flatten(2)), atol=1e-12, rtol=0)


def test_the_first_window_is_plain_causal_attention() -> None:
    m, x = layer(top=2), tokens(WINDOW)
    full = sc.nn.Attention(DIM, HEADS, "causal + rope").double()
    for linear, weight in zip(
        (full.query_proj, full.key_proj, full.value_proj), m.qkv_proj.weight.chunk(3), strict=True
    ):
        linear.weight.data = weight.detach().clone()
    full.out_proj.load_state_dict(m.out_proj.state_dict())
    torch.testing.assert_close(m(x), full(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(m(x, documents=2), full(x), atol=1e-12, rtol=0)


def test_memory_has_no_positions() -> None:
    m, x = layer(), tokens(3 * WINDOW)
    swapped = torch.cat((x[:, WINDOW : 2 * WINDOW], x[:, :WINDOW], x[:, 2 * WINDOW :]), 1)
    torch.testing.assert_close(m(swapped)[:, 2 * WINDOW :], m(x)[:, 2 * WINDOW :], atol=1e-12, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 23, [7, 1, 1, 11, 3], [23]])
@pytest.mark.parametrize(("top", "size"), [(None, None), (3, 8)])
def test_decoding_equals_the_whole_call(pieces: list[int], top: int | None, size: int | None) -> None:
    m, x = layer(top, size), tokens(23)
    truth = written_out(m, x)
    state, outs = m.init_state(2), []
    for piece in x.split(pieces, 1):
        y, state = m.step(piece, state)
        outs.append(y)
        assert size is None or state.size < size + WINDOW
    torch.testing.assert_close(torch.cat(outs, 1), truth, atol=1e-12, rtol=0)
    assert state.length == 23
    assert state.nbytes == 2 * HEADS * state.size * (2 * 4 * 8 + 8 + 4)


def test_later_tokens_and_padding_reach_nothing() -> None:
    m, x, lengths = layer(top=4), tokens(21, batch=3), torch.tensor([21, 8, 0])
    poisoned = x.clone()
    poisoned[1, 8:], poisoned[2] = math.nan, math.nan
    found = m(poisoned, key_lengths=lengths)
    torch.testing.assert_close(found[0], m(x[:1])[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1, :8], m(x[1:2, :8])[0], atol=1e-12, rtol=0)
    assert (found[1, 8:] == 0).all()
    assert (found[2] == 0).all()
    moved = torch.cat((x[:, :12], torch.randn_like(x[:, 12:])), 1)
    torch.testing.assert_close(m(moved)[:, :12], m(x)[:, :12], atol=1e-12, rtol=0)


def test_work_beside_the_search_does_not_grow_with_the_memory() -> None:
    m = sc.nn.FocusedAttention(32, 2, window=32, top=8)
    q, k, v = m.project(torch.randn(1, 32, 32))

    def cost(memory: int, top: int | None) -> int:
        m.top = top
        far = torch.randn(2, 1, 2, memory, 16)
        return flops(lambda: m.read(q, k, v, *far))

    search = 2 * 2 * 32 * 8192 * 16
    assert cost(16384, 8) - cost(8192, 8) == search
    assert cost(16384, None) - cost(8192, None) >= 2 * search


def test_no_token_gives_no_output() -> None:
    assert layer()(tokens(0)).shape == (2, 0, DIM)
    assert layer(4)(tokens(9, batch=0)).shape == (0, 9, DIM)
    assert layer()(tokens(0), documents=2).shape == (2, 0, DIM)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dim=10 must be a multiple of twice heads=2"):
        sc.nn.FocusedAttention(10, 2)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        sc.nn.FocusedAttention(12, 2, window=0)
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        sc.nn.FocusedAttention(12, 2, top=0)
    with pytest.raises(ValueError, match="size must be at least 1, got -1"):
        sc.nn.FocusedAttention(12, 2, size=-1)
    with pytest.raises(ValueError, match="a batch of 2 has 1 to 2 documents, got 3"):
        layer()(tokens(9), documents=3)
    with pytest.raises(ValueError, match="a batch of 2 has 1 to 2 documents, got 0"):
        sc.nn.crossbatch(torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="they take no padding"):
        layer()(tokens(9), documents=2, key_lengths=torch.tensor([9, 4]))


KEYS, VALUES, TOPICS = 16, 16, 64


def documents(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (count, 32, 3) of topic, key and value, and the answers to the last 16, (count, 16).

    A document has one topic, which no other of the batch has. Its first half gives each key a value, its second half asks for
    all of them, value 16 standing for none.
    """
    topic = torch.rand(TOPICS, generator=generator).argsort()[:count, None].expand(-1, 2 * KEYS)
    key = torch.cat([torch.rand(count, KEYS, generator=generator).argsort(1) for _ in range(2)], 1)
    value = torch.randint(VALUES, (count, KEYS), generator=generator).gather(1, key)
    shown = torch.cat((value[:, :KEYS], torch.full((count, KEYS), VALUES)), 1)
    return torch.stack((topic, key, shown), -1), value[:, KEYS:]


class Reader(nn.Module):
    """One layer over the sum of topic, key and value, to the value that is asked for."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, dim) for n in (TOPICS, KEYS, VALUES + 1))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.attention = sc.nn.FocusedAttention(dim, 2, window=KEYS)
        self.feed, self.out = FeedForward(dim), nn.Linear(dim, VALUES)

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.stack([table(tokens[..., n]) for n, table in enumerate(self.tables)]).sum(0)

    def forward(self, tokens: Tensor, documents: int) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.norms[0](x), documents=documents)
        x = x + self.feed(self.norms[1](x))
        return self.out(self.norms[2](x)[:, KEYS:])

    def own(self, tokens: Tensor, documents: int) -> float:
        """Of the weight on memory, the share that the own document's keys get."""
        q, k, v = self.attention.project(self.norms[0](self.embed(tokens)))
        memory = (sc.nn.crossbatch(y[:, :, :KEYS], documents) for y in (k, v))
        found = sc.attend(q[:, :, KEYS:], *memory, "full", need=("out", "weights"))
        return float(found.weights[..., :KEYS].sum(-1).mean())


@cache
def trained(documents_shown: int, seed: int, steps: int = 300) -> Reader:
    """A reader that was shown so many documents a memory, in the first half of its training fewer."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Reader()

    def loss(step: int) -> Tensor:
        tokens, answers = documents(16, generator)
        now = min(documents_shown, 1 + 2 * step * documents_shown // steps)
        return F.cross_entropy(model(tokens, now).flatten(0, 1), answers.flatten())

    train(model.parameters(), loss, steps, 1e-2)
    return model


@torch.no_grad()
def found_among(
    model: Reader, documents_shown: int, seed: int, top: int | None = None
) -> tuple[float, float]:
    """Accuracy and own share among the memories of so many documents, in 8 batches of 33."""
    generator, right, own = torch.Generator().manual_seed(seed + 1), 0.0, 0.0
    model.attention.top = top
    for _ in range(8):
        tokens, answers = documents(33, generator)
        right += float((model(tokens, documents_shown).argmax(-1) == answers).float().mean()) / 8
        own += model.own(tokens, documents_shown) / 8
    model.attention.top = None
    return right, own


def test_keys_learn_to_tell_32_distractor_documents_apart() -> None:
    alone, among = trained(1, FRESH), trained(8, FRESH)
    assert found_among(alone, 1, FRESH)[0] >= 0.95
    (right, own), (wrong, lost) = (found_among(m, 33, FRESH) for m in (among, alone))
    assert right >= 0.9
    assert right >= 1.3 * wrong
    assert own >= 1.3 * lost
    best, _ = found_among(among, 33, FRESH, top=8)
    assert best >= right - 0.02


@pytest.mark.slow
def test_the_gain_holds_on_three_seeds() -> None:
    for seed in range(FRESH + 1, FRESH + 4):
        (right, own), (wrong, lost) = (found_among(trained(n, seed), 33, seed) for n in (8, 1))
        assert right >= max(0.9, 2 * wrong), (right, wrong)
        assert own >= 2 * lost, (own, lost)
