"""S265, SeerAttention: a small gate on pooled queries and keys predicts which blocks a frozen model attends to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade import reference
from saccade.parts import blockmap
from saccade.parts.blockmap import block_map
from saccade.parts.tokens import Rope
from saccade.systems.seerattention import PooledGate, gate_loss
from saccade.tasks.needle import Needle
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import below, dense, largest_temporary, qkv, stepwise, train

pytestmark = pytest.mark.system("S265")


def gates(heads: int, kv: int, dim: int, width: int) -> dict[str, Tensor]:
    return {
        "gate_q": torch.randn(heads, dim, width, dtype=torch.float64),
        "gate_k": torch.randn(kv, 3 * dim, width, dtype=torch.float64) / 3,
    }


@pytest.mark.parametrize("length", [1, 7, 45])
@pytest.mark.parametrize("rows", [1, 5])
def test_all_blocks_are_dense_attention(length: int, rows: int) -> None:
    q, k, v = qkv(2, 4, length, 8, kv=2)
    for rope in ("false", "true"):
        text = f"seerattention(5, top=40, width=4, rows={rows}, rope={rope})"
        found = sc.attend(q, k, v, text, params=gates(4, 2, 8, 4))
        plain = sc.attend(q, k, v, "causal + rope") if rope == "true" else dense(q, k, v, below(length))
        torch.testing.assert_close(found, plain, atol=1e-12, rtol=0)


def turned(x: Tensor, at: int, base: float = 10000.0) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for m in range(half):
        angle = at * base ** (-2 * m / x.shape[-1])
        a, b = x[m], x[m + half]
        out[m] = a * math.cos(angle) - b * math.sin(angle)
        out[m + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def gate_scores(q: Tensor, k: Tensor, params: dict[str, Tensor], size: int, rows: int) -> Tensor:
    """The gate of SeerAttention, one pair of blocks at a time, of q and k before rotation: (b, h, N, U)."""
    b, h, n, _ = q.shape
    groups, units = -(-n // rows), -(-n // size)
    found = q.new_zeros(b, h, groups, units)
    for at in range(b):
        for head in range(h):
            g = head * k.shape[1] // h
            for row in range(groups):
                own = q[at, head, row * rows : (row + 1) * rows]
                number = (min(n, (row + 1) * rows) - 1) // size
                left = turned(own.mean(0) @ params["gate_q"][head], number)
                for unit in range(units):
                    keys = k[at, g, unit * size : (unit + 1) * size]
                    pooled = torch.cat((keys.max(0).values, keys.min(0).values, keys.mean(0)))
                    right = turned(pooled @ params["gate_k"][g], unit)
                    found[at, head, row, unit] = (left * right).sum() / left.shape[-1] ** 0.5
    return found


@pytest.mark.parametrize(("size", "rows"), [(4, 1), (4, 4), (3, 2)])
def test_the_gate_and_what_it_chooses(size: int, rows: int) -> None:
    q, k, v = qkv(2, 4, 22, 8, kv=2)
    params = gates(4, 2, 8, 6)
    c = replace(reference.context(q, k, v), params=params)
    gate = PooledGate(6)
    wanted = gate_scores(q, k, params, size, rows)
    got = gate.scores(gate.prepare(c, size, rows), slice(None), wanted.shape[-1])
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)
    rope, at = Rope(), torch.arange(22)[None]
    spun = replace(c, q=rope.map(q, at, "q", c), k=rope.map(k, at, "k", c))
    undone = replace(gate, turned=rope)
    again = undone.scores(undone.prepare(spun, size, rows), slice(None), wanted.shape[-1])
    torch.testing.assert_close(again, wanted, atol=1e-10, rtol=0)

    text = f"seerattention({size}, top=2, width=6, rows={rows})"
    exist = torch.zeros(2, 4, 22, 22, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            for i in range(22):
                last = min(22, (i // rows + 1) * rows) - 1
                past = wanted[b, h, i // rows, : last // size]
                for unit in {*past.topk(min(2, len(past))).indices.tolist(), i // size}:
                    exist[b, h, i, unit * size : (unit + 1) * size] = True
    expected = dense(spun.q, spun.k, v, exist & below(22))
    for kernel in (None, "gather", "slab"):
        found = sc.attend(q, k, v, text, params=params, kernel=kernel)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("lengths", [None, [17, 30]])
@pytest.mark.parametrize(("size", "rows", "queries"), [(4, 1, 30), (4, 4, 30), (3, 5, 30), (7, 2, 11)])
def test_the_tiled_pass_pools_the_explicit_map(
    monkeypatch: pytest.MonkeyPatch, size: int, rows: int, queries: int, lengths: list[int] | None, back: bool
) -> None:
    monkeypatch.setattr(blockmap, "TILE", {"cpu": (6, 9)})
    q, k, v = qkv(2, 4, 30, 8, kv=2)
    q = q[:, :, :queries]
    ends = None if lengths is None else torch.tensor(lengths)
    c = replace(reference.context(q, k, v, key_lengths=ends), looks_back=back)
    found = block_map(c, size, rows)
    for b in range(2):
        end = 30 if lengths is None else lengths[b]
        shared = lengths is not None and queries == 30
        first = 0 if shared else end - queries
        w = torch.zeros(4, queries, 30, dtype=torch.float64)
        for h in range(4):
            for i in range(queries):
                if shared and i >= end:
                    continue
                reach = range(min(end, first + i + 1) if back else end)
                s = torch.stack([q[b, h, i] @ k[b, h // 2, j] / 8**0.5 for j in reach])
                w[h, i, : len(s)] = s.softmax(0)
        for n in range(found.mass.shape[2]):
            for u in range(found.mass.shape[3]):
                tile = w[:, n * rows : (n + 1) * rows, u * size : (u + 1) * size].flatten(1)
                torch.testing.assert_close(found.largest[b, :, n, u], tile.amax(1), atol=1e-12, rtol=0)
                torch.testing.assert_close(found.mass[b, :, n, u], tile.sum(1), atol=1e-12, rtol=0)


def test_the_tiled_pass_in_float32_and_without_the_map() -> None:
    q, k, v = qkv(1, 2, 2048, 16, dtype=torch.float32)
    c = replace(reference.context(q, k, v), looks_back=True)
    s = (q @ k.mT / 4).masked_fill(~below(2048), -torch.inf).softmax(-1)
    explicit = s.unflatten(2, (-1, 64)).unflatten(4, (-1, 64)).amax((3, 5))
    torch.testing.assert_close(block_map(c, 64, 64).largest, explicit, atol=1e-6, rtol=0)
    assert largest_temporary(lambda: block_map(c, 64, 64)) < 2048 * 2048 * 4 * 2 / 8


def written_loss(q: Tensor, k: Tensor, params: dict[str, Tensor], size: int, rows: int) -> Tensor:
    """The divergence of the gate from the pooled map over past blocks, with rope, row by row."""
    n = q.shape[2]
    c, at, rope = reference.context(q, k, k), torch.arange(n)[None], Rope()
    w = (rope.map(q, at, "q", c) @ rope.map(k, at, "k", c).mT / q.shape[-1] ** 0.5).masked_fill(
        ~below(n), -torch.inf
    )
    w, scores = w.softmax(-1), gate_scores(q, k, params, size, rows)
    losses = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for row in range(scores.shape[2]):
                past = (min(n, (row + 1) * rows) - 1) // size
                if past:
                    target = torch.stack(
                        [
                            w[b, h, row * rows : (row + 1) * rows, u * size : (u + 1) * size].max()
                            for u in range(past)
                        ]
                    )
                    target = target / target.sum()
                    told = scores[b, h, row, :past].log_softmax(0)
                    losses.append((target * (target.log() - told)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("rows", [1, 4])
def test_the_loss_teaches_the_gate_alone(rows: int) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 2, 18, 8))
    params = {n: x.requires_grad_() for n, x in gates(2, 2, 8, 4).items()}
    text = f"seerattention(4, top=2, width=4, rows={rows})"
    loss = sc.attend(q, k, v, text, params=params, need=("losses",)).losses["gate"]
    wanted = written_loss(q.detach(), k.detach(), params, 4, rows)
    torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=0)
    got = torch.autograd.grad(loss, (*params.values(), q, k), allow_unused=True)
    assert got[2] is got[3] is None
    for a, b in zip(got, torch.autograd.grad(wanted, list(params.values())), strict=False):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_padding_teaches_nothing() -> None:
    q, k, v = qkv(2, 2, 20, 8)
    params, text = gates(2, 2, 8, 4), "seerattention(4, top=2, width=4)"
    short = [x.clone() for x in (q, k, v)]
    for x in short:
        x[1, :, 13:] = math.nan
    found = sc.attend(*short, text, params=params, need=("losses",), key_lengths=torch.tensor([20, 13]))
    parts = [
        sc.attend(*(x[b : b + 1, :, :n] for x in (q, k, v)), text, params=params, need=("losses",))
        for b, n in ((0, 20), (1, 13))
    ]
    rows = (16, 9)  # those after the first block
    mean = sum(p.losses["gate"] * n for p, n in zip(parts, rows, strict=True)) / sum(rows)
    torch.testing.assert_close(found.losses["gate"], mean)
    alone = sc.attend(q[:, :, :3], k[:, :, :3], v[:, :, :3], text, params=params, need=("losses",))
    assert float(alone.losses["gate"]) == 0


def test_one_query_a_choice_is_safe_and_a_shared_choice_leaks() -> None:
    single, shared = (sc.mechanism(f"seerattention(8, top=2, rows={n})") for n in (1, 8))
    assert (single.causality, shared.causality) == ("safe", "leak")
    torch.manual_seed(0)
    for m, moves in ((single, False), (shared, True)):
        layer = sc.nn.Attention(32, 4, m).double()
        x = torch.randn(1, 48, 32, dtype=torch.float64)
        y = torch.cat((x[:, :45], torch.randn(1, 3, 32, dtype=torch.float64)), 1)
        assert ((layer(x) - layer(y))[:, :45].abs().max() > 1e-6) == moves


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(32, 4, "seerattention(5, top=2, width=8)").double()
    x = torch.randn(2, 43, 32, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_bad_widths_are_refused() -> None:
    with pytest.raises(sc.MechanismError, match="width must be even, got 5"):
        sc.mechanism("seerattention(8, width=5)")


LENGTH, BLOCK = 64, 4
TASK = Needle(LENGTH, needles=4, queries=8, keys=4, values=4)


def model(mechanism: str) -> sc.nn.Transformer:
    return sc.nn.Transformer(TASK.vocab, 32, depth=1, heads=1, mechanism=mechanism, max_length=LENGTH)


def captured(frozen: sc.nn.Transformer, text: str, gated: sc.nn.Transformer) -> tuple[float, float, float]:
    """Attention mass in the chosen and own blocks, of all queries and of those that ask, and the accuracy."""
    other = model(text)
    other.load_state_dict(gated.state_dict(), strict=False)
    tokens, targets = TASK.batch(128, torch.Generator().manual_seed(100))
    with torch.no_grad():
        seen = frozen.blocks[0].norm1(frozen.embedding(tokens))
        chosen = other.blocks[0].attention(seen, need=("selection",)).selection
        w = frozen.blocks[0].attention(seen, need=("weights",)).weights
        j = torch.arange(LENGTH)
        kept = chosen.exist(slice(0, LENGTH), j[None], j) | (j[:, None] // BLOCK == j // BLOCK)
        mass = (w * kept).sum(-1)
        return float(mass.mean()), float(mass[..., -8:].mean()), accuracy(other(tokens), targets)


def test_a_taught_gate_captures_the_mass_of_a_frozen_recall_model() -> None:
    torch.manual_seed(0)
    frozen, generator = model("causal"), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(frozen.embedding.tokens.weight, std=0.2)

    def recall(step: int) -> Tensor:
        tokens, targets = TASK.batch(32, generator)
        return F.cross_entropy(frozen(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(frozen.parameters(), recall, 400, rate=5e-3)
    text = f"seerattention({BLOCK}, share(0.25), width=16, rope=false)"
    gated = model(text)
    gated.load_state_dict(frozen.state_dict(), strict=False)
    own = [p for n, p in gated.named_parameters() if ".gate_" in n]
    train(own, lambda step: gate_loss(frozen, gated, TASK.batch(16, generator)[0]), 200, rate=1e-2)
    for n, x in frozen.state_dict().items():
        assert torch.equal(gated.state_dict()[n], x)

    rest = f"+ chunk({BLOCK})"
    gate = captured(frozen, text, gated)
    mean = captured(frozen, f"causal + top_blocks({BLOCK}, share(0.25)) {rest}", gated)
    best = captured(frozen, f"causal + top_blocks({BLOCK}, share(0.25), proxy=block_mass) {rest}", gated)
    assert gate[1] >= 0.9
    assert gate[1] >= mean[1]
    assert gate[0] >= mean[0]
    assert gate[0] >= 0.97 * best[0]  # fillers attend so evenly that no quarter of the blocks holds 90%
    assert gate[2] >= mean[2]
