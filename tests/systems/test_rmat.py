"""S124, recurrent memory beside chunked attention: slots that sum up earlier chunks, gated, first in and first out."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import Embedding, FeedForward
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import FRESH, below, dense, flops, train

pytestmark = pytest.mark.system("S124")
DIM, HEADS, CHUNK = 12, 3, 4


def layer(slots: int) -> sc.nn.SlotMemoryAttention:
    torch.manual_seed(0)
    return sc.nn.SlotMemoryAttention(DIM, HEADS, chunk=CHUNK, slots=slots).double()


def tokens(n: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, DIM, dtype=torch.float64)


def rotated(x: Tensor, at: int) -> Tensor:
    """Rope of one vector at a position."""
    half = len(x) // 2
    angle = at * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))


def mixed(q: list[Tensor], k: list[Tensor], v: list[Tensor], out: Tensor) -> Tensor:
    """One query a head over its keys, then the output matrix."""
    heads = []
    for h in range(HEADS):
        at = slice(4 * h, 4 * h + 4)
        w = torch.softmax(torch.stack([q[h] @ key[at] for key in k]) / 2, 0)
        heads.append(sum(share * value[at] for share, value in zip(w, v, strict=True)))
    return out @ torch.cat(heads)


def by_head(x: Tensor) -> list[Tensor]:
    return [x[4 * h : 4 * h + 4] for h in range(HEADS)]


def turned(x: Tensor, at: int) -> Tensor:
    return torch.cat([rotated(y, at) for y in by_head(x)])


def written_out(m: sc.nn.SlotMemoryAttention, x: Tensor) -> Tensor:
    """Token by token; the memory is a list of slots."""
    rows = []
    for sample in x:
        slots: list[Tensor] = []
        for i, token in enumerate(sample):
            a, own = m.near, range(i // CHUNK * CHUNK, i + 1)
            q = by_head(turned(a.query_proj.weight @ token, i))
            k = [turned(a.key_proj.weight @ sample[j], j) for j in own]
            out = mixed(q, k, [a.value_proj.weight @ sample[j] for j in own], a.out_proj.weight)
            if m.slots and slots:
                b = m.far
                read = mixed(
                    by_head(b.query_proj.weight @ token),
                    [b.key_proj.weight @ s for s in slots],
                    [b.value_proj.weight @ s for s in slots],
                    b.out_proj.weight,
                )
                out = out + read / (1 + torch.exp(-(m.read_gate.weight @ token + m.read_gate.bias)))
            rows.append(out)
            if m.slots and (i + 1) % CHUNK == 0:
                c, whole = m.pool, sample[i + 1 - CHUNK : i + 1]
                k, v = ([w @ y for y in whole] for w in (c.key_proj.weight, c.value_proj.weight))
                s = mixed(list(c.query[:, 0]), k, v, c.out_proj.weight)
                old = slots[-1] if slots else torch.zeros_like(s)
                g = 1 / (1 + torch.exp(-(m.write_gate.weight @ torch.cat((s, old)) + m.write_gate.bias)))
                slots = [*slots, g * s + (1 - g) * old][-m.slots :]
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("slots", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 4, 18, 20])
def test_all_chunks_at_once_equal_the_formula_and_its_gradients(slots: int, n: int) -> None:
    m, x = layer(slots), tokens(n).requires_grad_()
    found, truth = m(x), written_out(m, x)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    wanted = [x, *m.parameters()]
    grads = (torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True) for y in (found, truth))
    for a, b in zip(*grads, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        assert float((a - b).abs().max()) < 1e-10


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("pieces", [[4] * 6, [1] * 24, [7, 1, 1, 12, 3]])
def test_streaming_equals_the_whole_call(slots: int, pieces: list[int]) -> None:
    m, x = layer(slots), tokens(24)
    state, outs = m.init_state(2), []
    for piece in x.split(pieces, 1):
        y, state = m.step(piece, state)
        outs.append(y)
        held = state.tokens.shape[1]
        assert held < CHUNK
        assert state.slots.shape[1] <= slots
        assert state.nbytes == 2 * DIM * 8 * (3 * held + state.slots.shape[1])
    torch.testing.assert_close(torch.cat(outs, 1), m(x), atol=1e-12, rtol=0)


def test_without_slots_it_is_block_diagonal_causal_attention() -> None:
    m, x = layer(0), tokens(18)
    text = sc.nn.Attention(DIM, HEADS, f"rope + causal + chunk({CHUNK})").double()
    text.load_state_dict(m.near.state_dict())
    torch.testing.assert_close(m(x), text(x), atol=1e-12, rtol=0)
    q, k, v = m.near.project(x)
    q, k = (torch.stack([turned(y[b, :, t].flatten(), t) for b in (0, 1) for t in range(18)]) for y in (q, k))
    q, k = (y.view(2, 18, HEADS, 4).transpose(1, 2) for y in (q, k))
    blocks = torch.arange(18) // CHUNK
    truth = dense(q, k, v, below(18) & (blocks[:, None] == blocks))
    torch.testing.assert_close(m(x), m.near.out_proj(truth.transpose(1, 2).flatten(2)), atol=1e-12, rtol=0)
    assert {name.split(".")[0] for name, _ in m.named_parameters()} == {"near"}


def test_the_first_chunk_reads_no_memory() -> None:
    m, x = layer(2), tokens(CHUNK)
    torch.testing.assert_close(m(x), m.near(x), atol=1e-12, rtol=0)


def test_an_open_gate_forgets_what_is_older_than_the_slots() -> None:
    m, x = layer(2), tokens(5 * CHUNK)
    moved = torch.cat((torch.randn_like(x[:, :CHUNK]), x[:, CHUNK:]), 1)
    assert (m(moved) - m(x))[:, 3 * CHUNK :].abs().max() > 1e-6
    m.write_gate.bias.data.fill_(60.0)
    change = (m(moved) - m(x)).abs().amax((0, 2))
    assert (change[3 * CHUNK :] < 1e-12).all()
    assert (change[CHUNK : 3 * CHUNK] > 1e-6).all()


def test_later_tokens_and_padding_reach_nothing() -> None:
    m, x, lengths = layer(2), tokens(21, batch=3), torch.tensor([21, 10, 0])
    poisoned = x.clone()
    poisoned[1, 10:], poisoned[2] = math.nan, math.nan
    found = m(poisoned, key_lengths=lengths)
    torch.testing.assert_close(found[0], m(x[:1])[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1, :10], m(x[1:2, :10])[0], atol=1e-12, rtol=0)
    assert (found[1, 10:] == 0).all()
    assert (found[2] == 0).all()
    moved = torch.cat((x[:, :14], torch.randn_like(x[:, 14:])), 1)
    torch.testing.assert_close(m(moved)[:, :14], m(x)[:, :14], atol=1e-12, rtol=0)


def test_work_grows_as_the_length() -> None:
    m = sc.nn.SlotMemoryAttention(32, 2, chunk=16, slots=4)
    cost = [flops(lambda n=n: m(torch.zeros(1, n, 32))) for n in (128, 256, 384)]
    assert cost[2] - cost[1] == cost[1] - cost[0]


@pytest.mark.parametrize("slots", [0, 2])
def test_no_token_gives_no_output(slots: int) -> None:
    m = layer(slots)
    assert m(tokens(0)).shape == (2, 0, DIM)
    assert m(tokens(9, batch=0)).shape == (0, 9, DIM)
    assert m.step(tokens(0), m.init_state(2))[0].shape == (2, 0, DIM)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dim=9 must be a multiple of twice heads=3"):
        sc.nn.SlotMemoryAttention(9, 3)
    with pytest.raises(ValueError, match="chunk must be at least 1 and slots at least 0, got 0 and 2"):
        sc.nn.SlotMemoryAttention(12, 3, chunk=0, slots=2)
    with pytest.raises(ValueError, match="slots at least 0, got 4 and -1"):
        sc.nn.SlotMemoryAttention(12, 3, chunk=4, slots=-1)


SYMBOLS, FILLERS, SPAN = 10, 8, 8
ASK = SYMBOLS + FILLERS


def codes(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four chunks of filler, tokens and targets (size, 32): the first starts with a code of four symbols, the last asks for it."""
    code = torch.randint(SYMBOLS, (size, 4), generator=generator)
    tokens = SYMBOLS + torch.randint(FILLERS, (size, 4 * SPAN), generator=generator)
    targets = torch.full_like(tokens, SILENT)
    tokens[:, :4], targets[:, -SPAN : 4 - SPAN] = code, code
    tokens[:, -SPAN], tokens[:, 1 - SPAN : 4 - SPAN] = ASK, code[:, :-1]
    return tokens, targets


class Copier(nn.Module):
    """One layer with learned positions."""

    def __init__(self, slots: int, dim: int = 32) -> None:
        super().__init__()
        self.embedding = Embedding(ASK + 1, dim, 4 * SPAN)
        for table in (self.embedding.tokens, self.embedding.positions):
            nn.init.normal_(table.weight, std=0.3)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mix, self.feed = sc.nn.SlotMemoryAttention(dim, 4, chunk=SPAN, slots=slots), FeedForward(dim)
        self.out = nn.Linear(dim, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.mix(self.norms[0](x))
        return self.out(x + self.feed(self.norms[1](x)))


@cache
def copied(slots: int, seed: int, steps: int) -> float:
    """Accuracy of the four symbols, each read after the ones before it."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Copier(slots)

    def loss(step: int) -> Tensor:
        tokens, targets = codes(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, 1e-2)
    tokens, targets = codes(500, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_a_code_is_copied_over_three_chunks() -> None:
    assert copied(3, FRESH, 240) >= 0.9
    assert copied(0, FRESH, 60) <= 1.5 / SYMBOLS


@pytest.mark.slow
def test_the_code_is_copied_on_three_seeds() -> None:
    for seed in range(FRESH + 1, FRESH + 4):
        assert copied(3, seed, 300) >= 0.9
        assert copied(0, seed, 100) <= 1.5 / SYMBOLS
