"""saccade-pocket: what its rows hold, and where their weights stand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from saccade.models import pocket
from saccade.models.pocket import corpus, recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(30):
        (tmp_path / f"{n}.txt").write_bytes(b"".join(b"%d and %d\n" % (n, m) for m in range(400)))
    (tmp_path / "long.txt").write_bytes(b"a long one\n" * 20_000)
    return tmp_path


def test_held_out_text_is_never_trained_on(folder: Path) -> None:
    made = corpus.domain("numbers", corpus.texts(folder), 1.0)
    sizes = sum(p.stat().st_size + 1 for p in folder.iterdir())
    assert len(made.train) + len(made.held_out) == sizes + 1
    assert 0.02 < len(made.held_out) / sizes < 0.15
    held = bytes(made.held_out[made.held_out < 256].astype(np.uint8))
    train = bytes(made.train[made.train < 256].astype(np.uint8))
    starts = [b"%d and 0\n" % n for n in range(30)]
    assert all((b"\n" + s in b"\n" + held) != (b"\n" + s in b"\n" + train) for s in starts)


@pytest.mark.parametrize("length", [256, 1024])
def test_rows_weigh_answers_and_not_what_was_drawn(folder: Path, length: int) -> None:
    made = corpus.domain("numbers", corpus.texts(folder), 1.0)
    tokens, targets, weights = next(iter(corpus.Rows([made], length, 40, 0.7, 0)))
    assert tokens.shape == targets.shape == weights.shape == (40, length)
    assert (tokens[:, 0] == corpus.BOS).all()
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert set(weights.unique().tolist()) == {0.0, 1.0, corpus.ANSWER_WEIGHT}
    for row, weight in zip(targets, weights, strict=True):
        text = bytes(row.clamp(max=255).tolist())
        at = text.find(b"Answer: ")
        while at >= 0:
            end = text.find(b"\n", at)
            if end > 0:
                assert (weight[at + 8 : end + 1] == corpus.ANSWER_WEIGHT).all()
            assert (weight[at : at + 8] == 1).all()
            at = text.find(b"Answer: ", at + 1)


def test_schedule_warms_up_and_ends_at_nothing() -> None:
    rates = [recipe.schedule(n / 1000) for n in range(1001)]
    assert rates[0] == rates[-1] == 0.0
    assert max(rates) == 1.0
    assert rates[10:650] == [1.0] * 640


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no"):
        corpus.texts(tmp_path)


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pocket, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"saccade\.models\.pocket\.recipe"):
        pocket.path()


@pytest.mark.parametrize("room", [150, 167, 240, 300, 512, 1024])
def test_every_room_holds_every_kind(room: int) -> None:
    text = b"a text to hide things in\n" * 60
    made = [corpus.asked(text, room, random.Random(seed)) for seed in range(400)]
    assert {m.kind for m in made} == {"needle", "recall", "variables", "copy"}
    assert all(len(m) <= room for m in made)
