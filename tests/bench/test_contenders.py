"""The mechanisms of a comparison: roles, causal forms, descriptions and pictures."""

from __future__ import annotations

import pytest

import saccade as sc
from saccade.bench import contenders
from saccade.bench.presets import QUICK, Speed

SPEED = Speed(lengths=(512, 1024), seconds=0.1)


def described(text: str) -> dict[str, object]:
    found = next(c for c in contenders.gather([text], SPEED) if c.name == text)
    return contenders.describe(found, SPEED, "cpu")


def test_the_reference_and_its_twin_come_first() -> None:
    found = contenders.gather(["moba"], SPEED)
    assert [(c.name, c.role) for c in found] == [
        ("causal", "reference"),
        ("causal + memory_efficient_attention", "twin"),
        ("moba", "candidate"),
    ]


def test_the_default_set_covers_every_family() -> None:
    names = [c.name for c in contenders.gather([], QUICK.speed)]
    assert names[2:] == [
        "window(128)",
        "moba",
        "causal + performer_favor",
        "causal + linear",
        "linformer(length=4096)",
    ]


def test_one_mechanism_is_measured_once_whatever_it_is_called() -> None:
    found = contenders.gather(["full", "causal", "window(128)", "window(128)", "causal + window(128)"], SPEED)
    assert [c.name for c in found[2:]] == ["window(128)", "causal + window(128)"]


def test_what_reads_the_future_is_made_causal_and_says_so() -> None:
    found = contenders.gather(["neighborhood(5)"], SPEED)[-1]
    assert found.note == "made causal"
    assert found.measured == sc.causal(sc.mechanism("neighborhood(5)"))
    assert sc.mechanism(str(found.measured)) == found.measured


def test_what_has_no_causal_form_says_why() -> None:
    found = contenders.gather(["linformer"], SPEED)[-1]
    assert found.trained is None
    assert "performer_favor" in found.reason
    assert "bidirectional" in found.note
    assert found.measured == found.mechanism


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(sc.MechanismError, match=r"windo.*nearest names: window"):
        contenders.gather(["windo(4)"], SPEED)


def test_descriptions() -> None:
    causal, window, linear = described("causal"), described("window(128)"), described("causal + linear")
    assert causal["role"] == "reference"
    assert (causal["cost"], linear["cost"]) == ("O(n^2)", "O(n)")
    assert causal["state_note"] == "caches all keys"
    assert window["state_note"] == "caches the latest 128 keys"
    assert linear["state_note"] == "state of fixed size"
    assert causal["trains_on"] == sc.plan("causal", (1, 8, 1024, 64), grad=True).kernel


def test_pictures_show_which_keys_are_read() -> None:
    causal = contenders.pattern(sc.mechanism("causal"))
    assert causal == [[int(key <= query) for key in range(32)] for query in range(32)]
    window = contenders.pattern(sc.mechanism("window(128)"))
    assert window == [[int(0 <= query - key < 8) for key in range(32)] for query in range(32)]
    assert contenders.pattern(sc.mechanism("causal + linear")) == causal


def test_pictures_of_chosen_blocks_hold_the_own_block_and_few_others() -> None:
    moba = contenders.pattern(sc.mechanism("moba(64, top=1)"))
    assert moba is not None
    for query, row in enumerate(moba):
        assert not any(row[query + 1 :])
        blocks = {key // 4 for key in range(query + 1) if row[key]}
        assert query // 4 in blocks
        assert len(blocks) == min(2, query // 4 + 1)


def test_what_cannot_be_drawn_has_no_picture() -> None:
    assert contenders.pattern(sc.mechanism("linformer(8, length=64)")) is None
