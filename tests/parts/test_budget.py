"""How many candidates a budget keeps, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.budget import Above, Apart, Budget, Mass, Share, Top, budget


def scored() -> Tensor:
    scores = torch.randn(40, 9, dtype=torch.float64) * 2
    return scores.masked_fill(torch.rand(40, 9) < 0.3, -torch.inf).index_fill(
        0, torch.tensor([3]), -torch.inf
    )


def kept(rule: Budget, row: list[float]) -> set[int]:
    """What the rule keeps of one row, as its words say."""
    order = sorted((n for n, x in enumerate(row) if x > -math.inf), key=lambda n: -row[n])
    total = sum(math.exp(row[n]) for n in order)
    match rule:
        case Top(count=n):
            return set(order[:n])
        case Share(share=x):
            return set(order[: math.ceil(round(x * len(order), 9))])
        case Above(threshold=t):
            return {n for n in order if math.exp(row[n]) / total >= t}
        case Mass(mass=p, least=least):
            found: list[int] = []
            for n in order:
                if len(found) >= least and sum(math.exp(row[m]) for m in found) / total >= p - 1e-6:
                    break
                found.append(n)
            return set(found)
        case Apart(first=n, keep_each=inner):
            return kept(inner, row[:n]) | {n + m for m in kept(inner, row[n:])}
    raise AssertionError(rule)


@pytest.mark.parametrize(
    "rule",
    [
        Top(1),
        Top(4),
        Top(50),
        Share(0.2),
        Share(0.5),
        Share(1.0),
        Mass(0.5),
        Mass(0.9, least=3),
        Mass(1.0),
        Above(0.0),
        Above(0.2),
        Apart(4, Share(0.3)),
        Apart(9, Top(2)),
        Apart(20, Mass(0.5)),
    ],
)
def test_what_is_kept(rule: Budget) -> None:
    scores = scored()
    index, valid = rule.keep(scores)
    assert index.shape[-1] <= rule.most(9) <= 9
    for n, row in enumerate(scores.tolist()):
        found = index[n][valid[n]].tolist()
        assert len(set(found)) == len(found)
        assert set(found) == kept(rule, row)


def test_a_whole_number_is_a_count() -> None:
    assert budget(3) == Top(3)
    assert budget(Share(0.5)) == Share(0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("top_blocks(8, share(0))", "share must be a number above 0"),
        ("top_blocks(8, share(1.5))", "use top"),
        ("top_blocks(8, mass(2))", "at most 1"),
        ("top_blocks(8, mass(0.5, least=0))", "at least 1"),
        ("top_blocks(8, top=chunk(4))", "must be a budget, one of top, share, mass, above"),
        ("top_blocks(8, 2.5)", "a whole number of at least 1, or a budget"),
    ],
)
def test_a_bad_budget_says_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(sc.MechanismError, match=words):
        sc.mechanism(text)
