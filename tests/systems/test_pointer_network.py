"""S132, pointer networks: positions of the input as the answer, decoded without repeats; sorting, hulls and tours."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.parts.base import Sizes
from saccade.tasks.hull import Hull, same_set
from saccade.tasks.metric import exact_match
from saccade.tasks.recall import SILENT
from saccade.tasks.sorting import Sorting
from saccade.tasks.tour import Tour, tour_length
from systems.helpers import qkv, train

pytestmark = pytest.mark.system("S132")


def test_the_weights_are_the_probabilities_of_the_positions_that_are_left() -> None:
    d, states, elements = 5, 3, 7
    q, k, v = qkv(1, 1, states, d, keys=elements)
    declared = sc.mechanism("pointer_network(4)").weights(Sizes(1, 1, d, d))
    p = {n: torch.randn(w.shape, dtype=torch.float64) for n, w in declared.items()}
    left = torch.rand(1, 1, states, elements) < 0.6
    left[..., 0] = True
    found = sc.attend(q, k, v, "pointer_network(4)", params=p, mask=left, need=("weights",)).weights
    for i in range(states):
        u = torch.full((elements,), -torch.inf, dtype=torch.float64)
        for j in range(elements):
            if left[0, 0, i, j]:
                hidden = k[0, 0, j] @ p["additive_k"][0] + q[0, 0, i] @ p["additive_q"][0]
                u[j] = p["additive_v"][0] @ torch.tanh(hidden)
        torch.testing.assert_close(found[0, 0, i], torch.softmax(u, 0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mechanism", ["pointer_network(8)", "bilinear", "dot"])
@pytest.mark.parametrize("ends", [False, True])
def test_logits_exclude_what_was_chosen_and_every_choice_gets_a_gradient(mechanism: str, ends: bool) -> None:
    model = sc.nn.PointerNetwork(2, 16, mechanism=mechanism, ends=ends)
    order = torch.rand(3, 5).argsort(1)
    logits = model(torch.rand(3, 5, 2), order)
    assert logits.shape == (3, 5, 5 + ends)
    for row, chosen in zip(logits, order.tolist(), strict=True):
        for place in range(5):
            gone = torch.isneginf(row[place]).nonzero()[:, 0].tolist()
            assert gone == sorted(chosen[:place])
    F.cross_entropy(logits.flatten(0, 1), order.flatten()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert {n for n, p in model.named_parameters() if p.grad is None} == (set() if ends else {"end"})


def log_probability(model: sc.nn.PointerNetwork, elements: Tensor, indices: Tensor) -> Tensor:
    """Of whole sequences (B, L), up to the end."""
    step = torch.log_softmax(model(elements, indices), -1).gather(2, indices[..., None])[..., 0]
    after = (indices == elements.shape[1]).cumsum(1) - (indices == elements.shape[1]).long() > 0
    return step.masked_fill(after, 0).sum(1)


def test_a_wide_beam_finds_the_likeliest_order_of_all() -> None:
    model = sc.nn.PointerNetwork(2, 16)
    elements = 3 * torch.randn(4, 4, 2)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    with torch.no_grad():
        every = torch.stack([log_probability(model, elements, o.expand(4, -1)) for o in orders])
    found, score = model.beam(elements, 24)
    torch.testing.assert_close(score, every.amax(0), atol=1e-5, rtol=0)
    assert torch.equal(found, orders[every.argmax(0)])


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_sequences_are_valid_and_their_score_is_their_log_probability(width: int, ends: bool) -> None:
    model = sc.nn.PointerNetwork(2, 16, ends=ends)
    elements = 3 * torch.randn(8, 6, 2)
    found, score = model.beam(elements, width)
    for row in found.tolist():
        chosen = row[: row.index(6)] if 6 in row else row
        assert len(set(chosen)) == len(chosen)
        assert set(row[len(chosen) :]) <= {6}
        assert ends or sorted(row) == list(range(6))
    with torch.no_grad():
        torch.testing.assert_close(score, log_probability(model, elements, found), atol=1e-5, rtol=0)
    if width == 1:
        assert torch.equal(found, model.greedy(elements))


def test_greedy_takes_the_greatest_logit_of_each_place() -> None:
    model = sc.nn.PointerNetwork(1, 16)
    elements = 3 * torch.randn(5, 7, 1)
    found = model.greedy(elements)
    assert torch.equal(model(elements, found).argmax(-1), found)
    torch.testing.assert_close(model.greedy(elements, 3), found[:, :3])


def test_bad_arguments_are_refused() -> None:
    model = sc.nn.PointerNetwork(1, 16)
    for width, length in ((0, 3), (1, 6), (1, 0)):
        with pytest.raises(ValueError, match="width of at least 1 and 1 to 5 places"):
            model.beam(torch.rand(1, 5, 1), width, length)
    for text in ("linear", "gauss_gate(3)"):
        with pytest.raises(sc.NotSupported, match="no plain logits"):
            sc.nn.PointerNetwork(1, 16, mechanism=text)


def learned(
    width: int, steps: int, task: Sorting | Hull | Tour, depth: int = 1, ends: bool = False, pool: int = 0
) -> sc.nn.PointerNetwork:
    """A network trained on a task; its answers are drawn anew, or from a pool where they are dear."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = sc.nn.PointerNetwork(width, 32, depth=depth, mechanism="pointer_network(32)", ends=ends)
    kept = task.batch(pool, generator) if pool else None

    def loss(step: int) -> Tensor:
        if kept is None:
            x, y = task.batch(64, generator)
        else:
            drawn = torch.randint(pool, (64,), generator=generator)
            x, y = kept[0][drawn], kept[1][drawn]
        logits = model(x.view(64, -1, width), y)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    return model


def test_numbers_are_sorted_also_more_than_were_seen() -> None:
    model = learned(1, 500, Sorting(5, 10))
    for count, least in ((5, 0.95), (10, 0.95), (12, 0.7)):
        numbers, order = Sorting(count, count).batch(500, torch.Generator().manual_seed(1))
        assert exact_match(model.greedy(numbers[..., None]), order) >= least


def test_corners_of_convex_hulls_are_found() -> None:
    model, generator = learned(2, 400, Hull(5, 8), depth=2, ends=True), torch.Generator().manual_seed(1)
    found = []
    for count in range(5, 9):
        points, corners = Hull(count, count).batch(250, generator)
        found.append(same_set(model.greedy(points), corners, count))
    assert sum(found) / 4 >= 0.6
    assert sum(found) / 4 > Hull(5, 8).chance + 0.3


def test_tours_are_shorter_than_random_ones_by_a_third() -> None:
    task = Tour(10)
    model = learned(2, 300, task, depth=2, pool=4000)
    points = task.draw(500, torch.Generator().manual_seed(1))
    greedy, beam = (float(tour_length(points, model.beam(points, w)[0]).mean()) for w in (1, 4))
    assert greedy <= 0.7 * task.chance
    assert beam <= greedy
