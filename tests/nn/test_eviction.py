"""Who leaves a full memory, against a memory that is a Python list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.nn.eviction import pieces

POLICIES = [sc.nn.Fifo(), sc.nn.LeastRecent(0.2), sc.nn.LeastFrequent()]


def played(policy: sc.nn.Eviction, weights: list[Tensor], size: int, step: int) -> tuple[list[int], list]:
    """Positions that one head holds after each group of `step` tokens; weights[n] (queries, all tokens) read in group n."""
    held: list[int] = []
    last: dict[int, float] = {}
    total: dict[int, float] = {}
    history = []
    for n, w in enumerate(weights):
        for j in range(n * step, (n + 1) * step):
            held.append(j)
            last[j], total[j] = j, 0.0
        for row, query in enumerate(w):
            for j in held:
                total[j] += float(query[j])
                if query[j] >= 0.2:
                    last[j] = max(last[j], n * step + row)
        while len(held) > size:
            rank = {sc.nn.Fifo: lambda j: j, sc.nn.LeastRecent: last.get, sc.nn.LeastFrequent: total.get}
            held.remove(min(held, key=lambda j: (rank[type(policy)](j), j)))
        history.append(list(held))
    return held, history


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_the_memory_holds_what_the_list_holds(policy: sc.nn.Eviction, size: int) -> None:
    step, groups, heads = 3, 7, 2
    k = torch.arange(step * groups, dtype=torch.float64).expand(1, heads, -1).unsqueeze(-1)
    weights = torch.rand(heads, groups, step, step * groups, dtype=torch.float64) ** 4
    told = [played(policy, list(w), size, step)[1] for w in weights]
    memory = sc.nn.KeyValueMemory.empty(k, 2 * k)
    for n in range(groups):
        cut = slice(n * step, (n + 1) * step)
        memory = memory.append(k[:, :, cut], 2 * k[:, :, cut], policy)
        read = weights[None, :, n].gather(-1, memory.positions.unsqueeze(2).expand(-1, -1, step, -1))
        memory = memory.read(read, torch.arange(n * step, (n + 1) * step), policy).keep(size)
        assert [h.tolist() for h in memory.positions[0]] == [history[n] for history in told]
        assert torch.equal(memory.k[..., 0], memory.positions.double())
        assert torch.equal(memory.v, 2 * memory.k)
    assert memory.length == step * groups
    assert memory.size == min(size, step * groups)


def test_what_is_kept_passes_gradients_and_ranks_do_not() -> None:
    k = torch.randn(1, 1, 4, 3, requires_grad=True)
    memory = sc.nn.KeyValueMemory.empty(k, k).append(k, k, sc.nn.LeastFrequent())
    weights = torch.tensor([[0.1, 0.5, 0.0, 0.4]], requires_grad=True).view(1, 1, 1, 4)
    memory = memory.read(weights, torch.tensor([3]), sc.nn.LeastFrequent()).keep(2)
    assert memory.positions.flatten().tolist() == [1, 3]
    assert not memory.ranks.requires_grad
    (grad,) = torch.autograd.grad(memory.k.sum(), k)
    assert grad[0, 0, :, 0].tolist() == [0, 1, 0, 1]


def test_pieces_end_at_the_edges() -> None:
    assert [(p.start, p.stop) for p in pieces(5, 9, 4)] == [(0, 3), (3, 7), (7, 9)]
    assert [(p.start, p.stop) for p in pieces(8, 4, 4)] == [(0, 4)]
    assert list(pieces(3, 0, 4)) == []


def test_a_weight_that_cannot_be_reached_is_refused() -> None:
    for least in (0.0, 1.5):
        with pytest.raises(ValueError, match="least is a weight above 0 and up to 1, got"):
            sc.nn.LeastRecent(least)
