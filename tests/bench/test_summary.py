"""Means, noise, ties, growth and the words made of them, from cells whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from saccade.bench import summary
from saccade.bench.advice import Judge, listing
from saccade.bench.compare import conclude

NAMES = {"causal": "reference", "twin": "twin", "near": "candidate", "slow": "candidate"}
LENGTHS = (512, 1024, 2048, 4096, 8192)


def quality(name: str, bits: float, seed: int = 0, windows: list[float] | None = None) -> dict[str, Any]:
    return {"kind": "quality", "mechanism": name, "seed": seed, "status": "ok", "bits_per_byte": bits,
            "window_bits": windows}  # fmt: skip


def recall(name: str, length: int, accuracy: float, seed: int = 0) -> dict[str, Any]:
    return {"kind": "recall", "mechanism": name, "length": length, "seed": seed, "status": "ok",
            "accuracy": accuracy, "questions": 2048}  # fmt: skip


def speed(name: str, length: int, ms: float, what: str = "forward", spread: float = 0.05) -> dict[str, Any]:
    low, high = ms * (1 - spread), ms * (1 + spread)
    return {"kind": "speed", "mechanism": name, "what": what, "length": length, "status": "ok",
            "samples_ms": [low, ms, high], "median_ms": ms, "p10_ms": low, "p90_ms": high, "peak_bytes": length}  # fmt: skip


def table(*cells: dict[str, Any]) -> summary.Table:
    return summary.Table({str(n): cell for n, cell in enumerate(cells)})


def results(*cells: dict[str, Any]) -> dict[str, Any]:
    mechanisms = [{"name": name, "role": role} for name, role in NAMES.items()]
    settings = {"tokens": 1000, "seeds": [0]}
    return {"mechanisms": mechanisms, "cells": {str(n): c for n, c in enumerate(cells)}, "settings": settings}


def full_run(near_bits: float = 2.5, near_recall: float = 0.98) -> dict[str, Any]:
    cells = [quality("causal", 2.5), quality("twin", 2.51), quality("near", near_bits), quality("slow", 3.0)]
    for name, far in (("causal", 0.99), ("twin", 0.99), ("near", near_recall), ("slow", 0.98)):
        cells += [recall(name, 64, 0.99), recall(name, 320, far)]
    for n in LENGTHS:
        cells += [speed("causal", n, n * n / 1e5), speed("twin", n, n * n / 1e5)]
        cells += [speed("near", n, n / 50), speed("slow", n, n * n / 1e4)]
    return conclude(results(*cells))


def entry(concluded: dict[str, Any], name: str) -> dict[str, Any]:
    return next(e for e in concluded["summary"] if e["name"] == name)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_exponent_is_that_of_a_power_law(power: float) -> None:
    assert summary.exponent({n: 3e-6 * n**power for n in LENGTHS}) == pytest.approx(power)


def test_exponent_leaves_fixed_costs_at_short_lengths_out() -> None:
    times = {n: max(10.0, n / 100) for n in LENGTHS}
    assert summary.exponent(times) == pytest.approx(1.0, abs=0.02)
    assert summary.exponent({256: 1.0, 512: 4.0}) == pytest.approx(2.0)
    assert summary.exponent({8192: 5.0}) is None


def test_faster_from_is_the_length_from_which_it_stays_faster() -> None:
    base = dict.fromkeys(LENGTHS, 10.0)
    assert summary.faster_from(dict(zip(LENGTHS, (5, 20, 9, 5, 1), strict=True)), base, 0.05) == 2048
    assert summary.faster_from(dict(zip(LENGTHS, (5, 20, 9, 5, 1), strict=True)), base, 0.2) == 4096
    assert summary.faster_from(dict(zip(LENGTHS, (1, 1, 1, 1, 20), strict=True)), base, 0.05) is None
    assert summary.faster_from({512: 1.0}, {1024: 9.0}, 0.05) is None


def test_noise_of_quality_is_at_least_what_separates_the_twins() -> None:
    cells = table(quality("causal", 2.5), quality("twin", 2.54), quality("near", 2.6))
    assert summary.noise(cells, "causal", "twin", ["near"])["bits_per_byte"] == pytest.approx(0.04)


def test_noise_of_quality_grows_with_the_spread_over_seeds() -> None:
    cells = [
        quality(name, 2.5 + shift, seed) for name in NAMES for seed, shift in enumerate((-0.1, 0.0, 0.1))
    ]
    found = summary.noise(table(*cells), "causal", "twin", ["near", "slow"])["bits_per_byte"]
    assert found == pytest.approx(2 * 0.1 / 3**0.5)


def test_noise_of_quality_knows_that_the_heldout_text_is_a_sample() -> None:
    one, other = [2.0, 3.0, 2.0, 3.0], [2.0, 3.2, 2.0, 3.2]
    cells = table(quality("causal", 2.5, windows=one), quality("near", 2.6, windows=other))
    found = summary.noise(cells, "causal", None, ["near"])["bits_per_byte"]
    assert found == pytest.approx(2 * (0.04 / 3) ** 0.5 / 2)


def test_noise_of_times_is_the_spread_of_samples() -> None:
    cells = table(*(speed("causal", n, 5.0, spread=0.08) for n in LENGTHS))
    found = summary.noise(cells, "causal", None, [])
    assert found["forward"] == pytest.approx(0.08)
    assert found["decode"] is None
    assert found["recall"] is None


def test_a_summary_holds_means_spreads_and_ties() -> None:
    cells = [quality("causal", b, s) for s, b in enumerate((2.4, 2.6))]
    cells += [quality("near", b, s) for s, b in enumerate((2.42, 2.6))]
    cells += [recall("near", 64, 0.5), recall("near", 64, 0.7, seed=1), speed("near", 512, 4.0)]
    t = table(*cells)
    entries = summary.summarise(t, ["causal", "near"], "causal", summary.noise(t, "causal", None, ["near"]))
    near = entries[1]
    assert near["bits_per_byte"] == pytest.approx(2.51)
    assert near["bits_per_byte_spread"] == pytest.approx(0.1273, abs=1e-4)
    assert near["quality_tie"] is True
    assert near["recall"] == {"64": pytest.approx(0.6)}
    assert near["forward_ms"] == {"512": 4.0}
    assert near["peak_bytes"]["forward"] == {"512": 512}
    assert near["status"] == "ok"


def test_failures_are_rows_with_a_reason() -> None:
    failed = {
        "kind": "quality",
        "mechanism": "near",
        "status": "failed",
        "error": "no causal form",
        "seed": 0,
    }
    partial = conclude(results(quality("causal", 2.5), failed, speed("near", 512, 4.0)))
    assert (entry(partial, "near")["status"], entry(partial, "near")["error"]) == (
        "partial",
        "no causal form",
    )
    whole = conclude(results(quality("causal", 2.5), failed))
    assert (entry(whole, "near")["status"], entry(whole, "near")["verdict"]) == ("failed", "not measured")


def test_the_faster_equal_is_advised() -> None:
    found = full_run()
    assert entry(found, "near")["faster_from"] == 4096
    assert entry(found, "near")["verdict"] == "quality tie, recalls, 4.1 times faster at 8,192"
    assert found["advice"][0].startswith("Use near from 4,096 tokens on, and causal below")
    assert "keeps the bits per byte and recall of causal" in found["advice"][0]
    assert entry(found, "slow")["verdict"] == "0.50 bits worse, recalls, 10 times slower at 8,192"


def test_what_forgets_is_advised_for_near_context_alone() -> None:
    found = full_run(near_recall=0.12)
    assert (
        found["advice"][0] == "Use causal: no other mechanism kept its bits per byte and recall in this run."
    )
    assert "answers 12% of the recall questions at 320 tokens" in found["advice"][1]
    assert entry(found, "near")["verdict"] == "quality tie, loses recall at 320, 4.1 times faster at 8,192"


def test_better_quality_is_no_tie_and_named_as_best() -> None:
    found = full_run(near_bits=2.4)
    assert entry(found, "near")["quality_tie"] is False
    assert entry(found, "near")["verdict"].startswith("0.10 bits better")
    assert "Fewest bits per byte on held-out text: near, 2.40." in found["advice"]


def test_recall_that_the_reference_did_not_learn_judges_nobody() -> None:
    cells = [
        quality("causal", 2.5),
        quality("near", 2.5),
        recall("causal", 320, 0.3),
        recall("near", 320, 0.1),
    ]
    found = conclude(results(*cells, speed("causal", 512, 9.0), speed("near", 512, 1.0)))
    assert entry(found, "near")["verdict"] == "quality tie, 9.0 times faster at 512"
    assert found["advice"][0].startswith("Use near from 512 tokens on")
    assert any("causal itself did not learn recall at 320" in c for c in found["caveats"])


def test_nothing_measured_gives_no_advice() -> None:
    found = conclude(results())
    assert found["advice"] == []
    assert {e["verdict"] for e in found["summary"][1:]} == {"quality unknown"}
    assert found["caveats"][0].startswith("What a short run cannot tell: ")


def test_times_alone_say_only_which_is_fast() -> None:
    found = conclude(results(speed("causal", 512, 9.0), speed("near", 512, 1.0)))
    assert "not which to use" in found["advice"][0]


def test_judge_counts_a_better_mechanism_as_keeping_quality() -> None:
    found = full_run(near_bits=2.0)
    judge = Judge(found["summary"], NAMES, found["noise"])
    assert judge.keeps_quality(entry(found, "near"))
    assert not judge.keeps_quality(entry(found, "slow"))


def test_listing() -> None:
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"
