"""Receptive fields against walks over the pairs, and against what papers claim."""

from __future__ import annotations

import pytest
import torch

import saccade as sc
from saccade.parts.algebra import static_exist


def walked(text: str, n: int, layers: int) -> float:
    """The share of pairs connected after so many layers, by following every pair."""
    m = sc.mechanism(text)
    exist = static_exist(m.pairs, torch.arange(n)[:, None], torch.arange(n)[None])  # type: ignore[attr-defined]
    reads = [{i} | set(exist[i].nonzero().flatten().tolist()) for i in range(n)]
    known = [{i} for i in range(n)]
    for _ in range(layers):
        known = [set().union(*(known[j] for j in reads[i])) for i in range(n)]
    return sum(map(len, known)) / (n * (n + 1) / 2 if m.causal else n * n)


@pytest.mark.parametrize(
    "text",
    ["window(5)", "neighborhood(5)", "causal + strided(6) + window(2)", "dilated(3, step=2)", "sink(1)"],
)
def test_coverage_is_that_of_walks(text: str) -> None:
    found = sc.receptive_field(text, 30, layers=3)
    for n, share in enumerate(found.coverage):
        assert share == pytest.approx(walked(text, 30, n + 1))


def test_windows_take_a_layer_for_each_width() -> None:
    for n, w in ((64, 9), (65, 9), (66, 9)):
        found = sc.receptive_field(f"window({w})", n)
        assert found.hops == -(-(n - 1) // (w - 1))
        assert found.reach == tuple(min(n - 1, (w - 1) * (a + 1)) for a in range(found.hops))
    assert sc.receptive_field("neighborhood(9)", 64).hops == 16
    assert sc.receptive_field("causal", 50).hops == sc.receptive_field("full", 50).hops == 1
    assert sc.receptive_field("causal + linear", 50).hops == 1


def test_what_never_connects_has_no_hops() -> None:
    found = sc.receptive_field("chunk(8)", 32)
    assert found.hops is None
    assert found.coverage == (0.25,)
    assert sc.receptive_field("dilated(4, step=2)", 32).hops is None


def test_members_and_heads_unite() -> None:
    assert sc.receptive_field("by_head(window(8), strided(8))", 64, heads=2).hops == 2
    assert sc.receptive_field("mix(window(8), strided(8))", 64).hops == 2
    assert sc.receptive_field("hepos", 64, heads=4).hops == 1
    assert sc.receptive_field("hepos(2)", 64, heads=2, layers=1).coverage == (1.0,)


def test_layers_that_differ_run_in_order() -> None:
    up = sc.receptive_field(["window(2)", "strided(8)"], 16)
    assert up.coverage == pytest.approx([31 / 136, (31 + 8 + 7) / 136])
    assert sc.receptive_field(["sink(1)", "chunk(8)"], 16).coverage[1] == pytest.approx((64 + 64 + 8) / 256)
    assert sc.receptive_field(["chunk(8)", "sink(1)"], 16).coverage[1] == pytest.approx((64 + 64 + 64) / 256)


def test_grids() -> None:
    m = sc.mechanism("na(3)").on_grid((8, 8))
    assert sc.receptive_field(m, 64).hops == 6
    assert sc.receptive_field(sc.mechanism("na(3, border=drop)").on_grid((8, 8)), 64).hops == 7


def test_blocks_of_tokens_bound_from_above() -> None:
    fine = sc.receptive_field("powerattention(8)", 512)
    coarse = sc.receptive_field("powerattention(8)", 512, block=8)
    assert fine.hops == coarse.hops
    loose = sc.receptive_field("window(9)", 130, block=4)
    tight = sc.receptive_field("window(9)", 130)
    assert loose.hops <= tight.hops
    assert len(loose.coverage) <= len(tight.coverage)


def test_bad_arguments() -> None:
    with pytest.raises(sc.NotSupported, match="chooses what it reads by content"):
        sc.receptive_field("moba", 64)
    with pytest.raises(sc.NotSupported, match="has no single pairs"):
        sc.receptive_field("nystromformer", 64)
    with pytest.raises(ValueError, match="in blocks of 1"):
        sc.receptive_field("causal", 100_000)
    with pytest.raises(ValueError, match="give one, as in attend"):
        sc.receptive_field("na(3)", 64)
