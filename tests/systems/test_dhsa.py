"""S280, DHSA: a net cuts the text into chunks, and a query reads the keys of the chunks that suit its own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade import reference
from saccade.parts.base import Sizes
from saccade.parts.spread import TopChunks, fill, peaks, split_labels, window_means
from systems.helpers import below, dense, qkv, stepwise, train

pytestmark = pytest.mark.system("S280")


def net(heads: int, dim: int, hidden: int = 16) -> dict[str, Tensor]:
    found = TopChunks(hidden=hidden).weights(Sizes(heads, heads, dim, dim))
    return {n: torch.randn(w.shape, dtype=torch.float64) for n, w in found.items()}


@pytest.mark.parametrize("text", ["dhsa(70)", "dhsa(70, past=true)", "dhsa(70, every=8)"])
@pytest.mark.parametrize("length", [1, 30, 70])
def test_a_full_budget_is_dense_attention(text: str, length: int) -> None:
    q, k, v = qkv(2, 4, length, 8, kv=2)
    params = {} if "every" in text else net(2, 8)
    found = sc.attend(q, k, v, text, params=params)
    torch.testing.assert_close(found, dense(q, k, v, below(length)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("past", ["false", "true"])
@pytest.mark.parametrize("length", [20, 45])
def test_chunks_of_one_token_rank_keys_by_the_dot_product(past: str, length: int) -> None:
    q, k, v = qkv(2, 2, length, 8)
    text = f"dhsa(6, every=1, past={past})"
    chosen = sc.attend(q, k, v, text, need=("selection",)).selection
    s = (q @ k.transpose(-1, -2)).masked_fill(~below(length), -math.inf)
    if past == "true":  # the own token is the open chunk, read in any case
        s.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    for i in range(length):
        wanted = s[:, :, i].topk(min(6, i + 1)).indices.sort(-1).values
        got = chosen.index[:, :, i, : min(6, i + 1)]
        assert chosen.valid[:, :, i].sum(-1).eq(min(6, i + 1)).all()
        assert torch.equal(got.sort(-1).values, wanted)


def test_equal_chunks_are_a_choice_of_blocks_by_their_means() -> None:
    q, k, v = qkv(2, 4, 48, 8, kv=2)
    chosen = sc.attend(q, k, v, "top_chunks(16, every=8)", need=("selection",)).selection
    blocks = sc.attend(q, k, v, "top_blocks(8, top=2, rows=8)", need=("selection",)).selection
    wanted = (blocks.index.unsqueeze(-1) * 8 + torch.arange(8)).flatten(-2).repeat_interleave(8, 2)
    assert chosen.valid.all()
    assert torch.equal(chosen.index.sort(-1).values, wanted.sort(-1).values)


def written_out(
    c: reference.Context, starts: list[int], row: int, head: int, top: int, past: bool, ahead: int
) -> set[int]:
    """The keys of one row of one head of the first sample, as the words of the mechanism say."""
    n, g = c.k.shape[2], head * c.k.shape[1] // c.q.shape[1]
    chunks = [range(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]

    def one(x: Tensor, members: range) -> Tensor:
        return math.sqrt(len(members)) * torch.stack([x[t] for t in members]).mean(0)

    mine = next(m for m in chunks if row in m)
    asks = c.q[0, head, row] if past else one(c.q[0, head], mine)
    order = sorted(chunks, key=lambda m: -float(asks @ one(c.k[0, g], m)))
    if past:
        known = [m for m in order if m.stop + ahead <= row]
        tail = range(max((m.stop for m in known), default=0), row + 1)
        order = [tail, *known]
    found: list[int] = []
    for m in order:
        found += [t for t in reversed(m) if t <= row]
    return set(found[:top])


@pytest.mark.parametrize("past", [False, True])
def test_the_choice_equals_the_formula(past: bool) -> None:
    q, k, v = qkv(1, 4, 60, 8, kv=2)
    part = TopChunks(17, window=4, gap=3, past=past)
    c = replace(reference.context(q, k, v, params=net(2, 8)), looks_back=True)
    starts = part.starts(c)[0].nonzero().squeeze(-1).tolist()
    assert len(starts) > 3
    chosen = part.choose(c)
    for row in range(60):
        for head in range(4):
            got = chosen.index[0, head, row][chosen.valid[0, head, row]].tolist()
            assert len(set(got)) == len(got)
            assert set(got) == written_out(c, starts, row, head, 17, past, 4 + 3 - 2)


def test_windows_before_and_after_a_key() -> None:
    x = torch.randn(2, 3, 11, 4, dtype=torch.float64)
    left, right = window_means(x, 3, torch.arange(11) < torch.tensor([[11], [7]]))
    for b, end in enumerate((11, 7)):
        for t in range(end):
            before, after = x[b, :, max(0, t - 3) : t], x[b, :, t : min(end, t + 3)]
            wanted = before.mean(1) if t else torch.zeros(3, 4, dtype=torch.float64)
            torch.testing.assert_close(left[b, :, t], wanted)
            torch.testing.assert_close(right[b, :, t], after.mean(1))


@pytest.mark.parametrize("gap", [1, 2, 5])
def test_cuts_are_kept_apart(gap: int) -> None:
    x = torch.randint(0, 6, (4, 40)).double()
    found = peaks(x, gap)
    for b in range(4):
        for t in range(40):
            near = x[b, max(0, t - gap + 1) : t + gap]
            first = max(0, t - gap + 1) + int((near == near.max()).nonzero()[0])
            assert bool(found[b, t]) == (first == t)


def test_filling_takes_whole_units_and_the_end_of_the_last() -> None:
    scores = torch.tensor([[[[1.0, 3.0, -math.inf, 2.0]]]])
    lo, hi = torch.tensor([0, 3, 5, 9]), torch.tensor([3, 5, 9, 12])
    index, valid = fill(scores, lo, hi, 6)
    assert index[0, 0, 0].tolist() == [4, 3, 11, 10, 9, 2]
    assert valid.all()
    index, valid = fill(scores, lo, hi, 10)
    assert valid[0, 0, 0].tolist() == [True] * 8 + [False] * 2


def test_made_from_the_past_it_decodes_as_it_trains_and_otherwise_it_says_that_it_leaks() -> None:
    assert sc.mechanism("dhsa").causality == "leak"
    assert sc.mechanism("dhsa(past=true)").causality == "safe"
    layer = sc.nn.Attention(32, 4, "dhsa(9, window=3, gap=2, past=true)").double()
    x = torch.randn(2, 43, 32, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)
    q, k, v = qkv(2, 2, 60, 8)
    params = net(2, 8)
    first = sc.attend(q, k, v, "dhsa(12, past=true)", params=params)
    later = (torch.arange(60) >= 37)[:, None]
    moved = [torch.where(later, torch.randn_like(x), x) for x in (q, k, v)]
    again = sc.attend(*moved, "dhsa(12, past=true)", params=params)
    torch.testing.assert_close(again[:, :, :37], first[:, :, :37], atol=1e-12, rtol=0)


def test_labels_need_a_query_for_every_key() -> None:
    q, k, v = qkv(1, 2, 9, 8, keys=12)
    with pytest.raises(ValueError, match="as many queries as keys, got 9 and 12"):
        sc.attend(q, k, v, "dhsa(4)", params=net(2, 8), need=("losses",))


class Planted:
    """Stretches of 8 to 64 tokens on one of eight topics, and a frozen layer whose queries look for their own topic."""

    def __init__(self, seed: int, dim: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.topics = torch.randn(8, dim, generator=self.generator)
        torch.manual_seed(seed)
        self.layer = sc.nn.Attention(dim, 2, "dhsa(48)", generator=self.generator).requires_grad_(False)
        self.layer.key_proj.weight *= 1.5
        self.layer.query_proj.load_state_dict(self.layer.key_proj.state_dict())
        self.net = [self.layer.get_parameter(n).requires_grad_() for n in self.layer.weight_names]

    def draw(self, batch: int, length: int = 256) -> tuple[Tensor, Tensor]:
        """Tokens (batch, length, dim), and where a stretch begins that is not the first."""
        labels, cuts = (torch.zeros(batch, length, dtype=torch.long) for _ in range(2))
        for b in range(batch):
            at = topic = 0
            while at < length:
                step, long = (
                    torch.randint(1, 8, (), generator=self.generator),
                    torch.randint(8, 65, (), generator=self.generator),
                )
                topic = (topic + int(step)) % 8
                labels[b, at : at + int(long)], cuts[b, at] = topic, at > 0
                at += int(long)
        noise = torch.randn(batch, length, self.topics.shape[1], generator=self.generator)
        return self.topics[labels] + 0.5 * noise, cuts.bool()


def agreement(found: Tensor, cuts: Tensor) -> float:
    """F1 of exact places."""
    return 2 * float((found & cuts).sum()) / float(found.sum() + cuts.sum())


def test_cuts_learned_from_attention_find_planted_topics_and_hold_more_mass_than_as_many_equal_blocks() -> (
    None
):
    planted = Planted(0)
    layer = planted.layer

    def loss(step: int) -> Tensor:
        return layer(planted.draw(8)[0], need=("out", "losses")).losses["boundary"]

    train(planted.net, loss, 120, rate=1e-2)
    x, cuts = planted.draw(32)
    q, k, v = layer.project(x)
    params = {n: layer.get_parameter(n) for n in layer.weight_names}
    c = reference.context(q, k, v, params=params)
    part = layer.mechanism.pairs.parts[1]
    starts = part.starts(c) & (torch.arange(256) > 0)
    assert agreement(split_labels(c, part.window, part.gap), cuts) >= 0.9
    assert agreement(starts, cuts) >= 0.9
    w = sc.attend(q, k, v, "causal", need=("weights",)).weights

    def held(text: str, params: dict[str, Tensor]) -> float:
        """The mass of dense attention on the chosen keys, over rows that have more keys than the budget."""
        chosen = sc.attend(q, k, v, text, params=params, need=("selection",)).selection
        return float((w.gather(-1, chosen.index) * chosen.valid)[:, :, 64:].sum(-1).mean())

    equal = round(256 * 32 / int(starts.sum() + 32))  # as many blocks as there are chunks
    assert held("dhsa(48)", params) >= held(f"dhsa(48, every={equal})", {}) + 0.05
