"""S095, Attendre: queries wait for later keys and read a bounded memory that evicts what is attended least."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import FeedForward
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import FRESH, below, dense, flops, train

pytestmark = pytest.mark.system("S095")
DIM, HEADS, CHUNK = 12, 3, 4
POLICIES = [sc.nn.Fifo(), sc.nn.LeastRecent(0.25), sc.nn.LeastFrequent()]
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)


def layer(
    size: int,
    delay: int = 0,
    policy: sc.nn.Eviction | None = None,
    top: int | None = None,
    rope: bool = False,
) -> sc.nn.DelayedAttention:
    torch.manual_seed(0)
    made = sc.nn.DelayedAttention(
        DIM, HEADS, size=size, delay=delay, chunk=CHUNK, evict=policy, top=top, rope=rope
    ).double()
    made.qkv_proj.weight.data *= 3
    return made


def tokens(n: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.float64)


def rotated(x: Tensor, at: int) -> Tensor:
    """Rope of one vector at a position."""
    half = len(x) // 2
    angle = at * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))


def projected(m: sc.nn.DelayedAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, n, d)."""
    return m.qkv_proj(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind()


def one_head(m: sc.nn.DelayedAttention, q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> Tensor:
    """Token by token: one key comes, the query that has waited long enough reads, and at an edge the lowest leave."""
    held: list[int] = []
    last: dict[int, float] = {}
    total: dict[int, float] = {}
    out: list[Tensor] = []

    def read(i: int, now: int, edge: int) -> None:
        score = {j: q[i] @ k[j] / math.sqrt(len(q[i])) for j in held}
        old = sorted((j for j in held if j < edge), key=lambda j: float(-score[j].detach()))[: m.top]
        taken = old + [j for j in held if j >= edge]
        w = torch.softmax(torch.stack([score[j] for j in taken]), 0)
        for j, share in zip(taken, w.tolist(), strict=True):
            total[j] += share
            if share >= 0.25:
                last[j] = max(last[j], now)
        out.append(sum(share * v[j] for share, j in zip(w, taken, strict=True)))

    rank = {sc.nn.Fifo: lambda j: j, sc.nn.LeastRecent: last.get, sc.nn.LeastFrequent: total.get}
    for t in range(len(q)):
        held.append(t)
        last[t], total[t] = t, 0.0
        if t >= m.delay:
            read(t - m.delay, t, t // CHUNK * CHUNK)
        while (t + 1) % CHUNK == 0 and len(held) > m.size:
            held.remove(min(held, key=lambda j: (rank[type(m.evict)](j), j)))
    for i in range(max(0, len(q) - m.delay), len(q)):
        read(i, len(q), len(q) // CHUNK * CHUNK)
    return torch.stack(out)


def written_out(m: sc.nn.DelayedAttention, x: Tensor) -> Tensor:
    """Head by head."""
    q, k, v = projected(m, x)
    rows = []
    for b in range(len(x)):
        heads = []
        for h in range(HEADS):
            lists = [list(y[b, h]) for y in (q, k, v)]
            if m.rope:
                lists[:2] = [[rotated(z, t) for t, z in enumerate(y)] for y in lists[:2]]
            heads.append(one_head(m, *lists))
        rows.append(torch.cat(heads, -1))
    return m.out_proj(torch.stack(rows))


@each_policy
@pytest.mark.parametrize(
    ("size", "delay", "top", "rope"),
    [(6, 0, None, True), (5, 3, None, False), (7, 9, 2, True), (1, 0, 1, False)],
)
def test_equals_the_formula_and_its_gradients(
    policy: sc.nn.Eviction, size: int, delay: int, top: int | None, rope: bool
) -> None:
    m, x = layer(size, delay, policy, top, rope), tokens(22).requires_grad_()
    found, truth = m(x), written_out(m, x)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    wanted = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (found, truth)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_policies_differ() -> None:
    x = tokens(40)
    a, b, c = (layer(5, policy=p)(x).detach() for p in POLICIES)
    assert min(float((y - z).abs().max()) for y, z in ((a, b), (b, c), (a, c))) > 1e-3


@each_policy
def test_a_memory_and_a_delay_as_long_as_the_text_are_full_attention(policy: sc.nn.Eviction) -> None:
    m, x = layer(21, 21, policy), tokens(21)
    truth = m.out_proj(dense(*projected(m, x)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x), truth, atol=1e-12, rtol=0)
    full = layer(21, 21, policy, rope=True)
    torch.testing.assert_close(full(x), written_out(full, x), atol=1e-12, rtol=0)
    assert m.causality == "leak"


@each_policy
def test_a_memory_as_long_as_the_text_and_no_delay_are_causal_attention(policy: sc.nn.Eviction) -> None:
    m, x = layer(21, 0, policy), tokens(21)
    truth = m.out_proj(dense(*projected(m, x), below(21)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x), truth, atol=1e-12, rtol=0)
    assert m.causality == "safe"


def test_a_query_reads_no_further_ahead_than_its_delay() -> None:
    m, x = layer(8, 3, sc.nn.LeastFrequent()), tokens(30)
    moved = torch.cat((x[:, :17], torch.randn_like(x[:, 17:])), 1)
    change = (m(moved) - m(x)).abs().amax((0, 2))
    assert (change[:14] < 1e-12).all()
    assert change[14] > 1e-4


@each_policy
@pytest.mark.parametrize("pieces", [[1] * 23, [7, 1, 1, 11, 3], [23]])
@pytest.mark.parametrize("delay", [0, 5])
def test_streaming_equals_the_whole_call(policy: sc.nn.Eviction, pieces: list[int], delay: int) -> None:
    m, x = layer(6, delay, policy, top=3), tokens(23)
    state, outs, seen = m.init_state(2), [], 0
    for piece in x.split(pieces, 1):
        y, state = m.step(piece, state)
        outs.append(y)
        seen += piece.shape[1]
        assert sum(y.shape[1] for y in outs) == max(0, seen - delay)
        assert state.memory.size < 6 + CHUNK
        held = 2 * HEADS * (state.memory.size * (2 * 4 * 8 + 8 + 4) + min(seen, delay) * 4 * 8)
        assert state.nbytes == held
    outs.append(m.flush(state))
    torch.testing.assert_close(torch.cat(outs, 1), written_out(m, x), atol=1e-12, rtol=0)


def test_padding_reaches_nothing() -> None:
    m, x, lengths = layer(5, 4, sc.nn.LeastFrequent()), tokens(21, batch=4), torch.tensor([21, 10, 0, 10])
    poisoned = x.clone()
    for b, n in enumerate(lengths):
        poisoned[b, n:] = math.nan
    found = m(poisoned, key_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[b, :n], m(x[b : b + 1, :n])[0], atol=1e-12, rtol=0)
        assert (found[b, n:] == 0).all()


def test_work_grows_as_the_length() -> None:
    m = sc.nn.DelayedAttention(8, 2, size=32, delay=16, chunk=16, evict=sc.nn.LeastRecent())
    cost = [flops(lambda n=n: m(torch.zeros(1, n, 8))) for n in (64, 128, 192)]
    assert cost[2] - cost[1] == cost[1] - cost[0]


def test_no_token_gives_no_output() -> None:
    assert layer(4, 2)(tokens(0)).shape == (2, 0, DIM)
    assert layer(4)(tokens(9, batch=0)).shape == (0, 9, DIM)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dim=10 must be a multiple of heads=3"):
        sc.nn.DelayedAttention(10, 3)
    with pytest.raises(ValueError, match="rope turns pairs of channels: dim=9 must be a multiple of twice"):
        sc.nn.DelayedAttention(9, 3, rope=True)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        sc.nn.DelayedAttention(12, 3, size=0)
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        sc.nn.DelayedAttention(12, 3, top=0)
    with pytest.raises(ValueError, match="chunk must be at least 1, got -2"):
        sc.nn.DelayedAttention(12, 3, chunk=-2)
    with pytest.raises(ValueError, match="delay counts later tokens, at least 0, got -1"):
        sc.nn.DelayedAttention(12, 3, delay=-1)
    with pytest.raises(TypeError, match=r"evict must be an Eviction such as Fifo\(\).*got 'lru'"):
        sc.nn.DelayedAttention(12, 3, evict="lru")


KEYS, VALUES, FILLERS = 8, 8, 32


def stream(
    size: int, length: int, generator: torch.Generator, shown: int = 64, part: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Tokens (size, length, 3) of key, value and filler, each with a last word for none, and targets (size, length).

    Among the first `shown` tokens every key gets its value; a `part` of all later ones names a key and asks for it. The rest
    is filler.
    """
    value = torch.randint(VALUES, (size, KEYS), generator=generator)
    place = torch.rand(size, shown, generator=generator).argsort(1)[:, :KEYS]
    key, shown_value = torch.full((size, length), KEYS), torch.full((size, length), VALUES)
    asked = torch.randint(KEYS, (size, length), generator=generator)
    asks = torch.rand(size, length, generator=generator) < part
    asks[:, :shown] = False
    key = torch.where(asks, asked, key).scatter(1, place, torch.arange(KEYS).expand(size, -1))
    shown_value.scatter_(1, place, value)
    filler = torch.randint(FILLERS, (size, length), generator=generator).masked_fill(key < KEYS, FILLERS)
    return torch.stack((key, shown_value, filler), -1), value.gather(1, asked).masked_fill(~asks, SILENT)


class Listener(nn.Module):
    """One layer over the sum of key, value and filler, to the value that is asked for."""

    def __init__(self, size: int, delay: int, dim: int = 32) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n + 1, dim) for n in (KEYS, VALUES, FILLERS))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.mix = sc.nn.DelayedAttention(dim, 2, size=size, delay=delay, chunk=64)
        self.feed, self.out = FeedForward(dim), nn.Linear(dim, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.stack([table(tokens[..., n]) for n, table in enumerate(self.tables)]).sum(0)
        x = x + self.mix(self.norms[0](x))
        x = x + self.feed(self.norms[1](x))
        return self.out(self.norms[2](x))


@cache
def trained(seed: int, delay: int, steps: int = 200) -> Listener:
    """A model that has seen streams of 64 tokens, all of which its memory held."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Listener(512, delay)

    def loss(step: int) -> Tensor:
        tokens, targets = stream(16, 64, generator, shown=16, part=0.5)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, 1e-2)
    return model


@torch.no_grad()
def recalled(model: Listener, policy: sc.nn.Eviction, seed: int) -> float:
    """Accuracy in the last quarter of streams of 4,096 tokens, by a memory of 512."""
    tokens, targets = stream(4, 4096, torch.Generator().manual_seed(seed + 1))
    model.mix.evict = policy
    return accuracy(model(tokens)[:, -1024:], targets[:, -1024:])


@pytest.mark.parametrize("policy", POLICIES[1:], ids=lambda p: type(p).__name__)
def test_what_is_read_again_and_again_stays_in_memory(policy: sc.nn.Eviction) -> None:
    model = trained(FRESH, 0)
    oldest, found = recalled(model, sc.nn.Fifo(), FRESH), recalled(model, policy, FRESH)
    assert found >= oldest + 0.2
    assert found >= 0.9


@pytest.mark.slow
def test_the_gain_holds_on_three_seeds_and_with_a_delay() -> None:
    for seed in range(FRESH + 1, FRESH + 4):
        for delay in (0, 16):
            model = trained(seed, delay)
            oldest = recalled(model, sc.nn.Fifo(), seed)
            assert min(recalled(model, p, seed) for p in POLICIES[1:]) >= oldest + 0.5
