"""Digits: nothing tested is trained on, images become sequences and back, and the extra is named when it is missing."""

from __future__ import annotations

import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from saccade.tasks.digits import LEVELS, Digits
from tasks.helpers import repeatable, seeded


def rows_of(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_the_parts_share_no_image_and_are_all_of_it() -> None:
    images, labels, test, answers = Digits().parts
    assert len(images) + len(test) == len(load_digits().images) == 1797
    assert len(rows_of(images)) + len(rows_of(test)) == 1797
    assert not rows_of(images) & rows_of(test)
    for digit in range(10):
        held = int((answers == digit).sum())
        assert held / (held + int((labels == digit).sum())) == pytest.approx(0.25, abs=0.01)


def test_another_seed_holds_out_other_images() -> None:
    first, other = (rows_of(Digits(seed=seed).parts[2]) for seed in (0, 1))
    assert len(first) == len(other)
    assert len(first & other) < len(first) / 2


def test_small_example() -> None:
    """The first image of the data is a zero; it is in one of the parts, in grey levels of 1/16."""
    data = load_digits()
    first = torch.tensor(data.images[0], dtype=torch.float32) / 16
    images, labels, test, answers = Digits().parts
    every, said = torch.cat((images, test))[:, 0], torch.cat((labels, answers))
    found = (every == first).all((1, 2)).nonzero()[:, 0]
    assert said[found].tolist() == [data.target[0]] == [0]


def test_images_as_sequences() -> None:
    task = Digits()
    images, _ = task.batch(20, seeded())
    assert images.shape == (20, 1, 8, 8)
    pixels = task.pixels(images)
    assert pixels.shape == (20, 64)
    assert pixels.dtype == torch.int64
    assert pixels.min() == 0
    assert pixels.max() < LEVELS
    assert torch.equal(pixels.view(20, 1, 8, 8) / 16, images)
    assert torch.equal(task.rows(images), images[:, 0])


@pytest.mark.parametrize("side", [4, 12, 16])
def test_sides_hold_the_same_split(side: int) -> None:
    small, large = Digits().parts, Digits(side=side).parts
    assert large[0].shape[1:] == (1, side, side)
    assert torch.equal(small[1], large[1])
    assert torch.equal(small[3], large[3])
    assert large[2].min() >= 0
    assert large[2].max() <= 1
    means = torch.stack((small[2].mean((1, 2, 3)), large[2].mean((1, 2, 3))))
    assert torch.corrcoef(means)[0, 1] > 0.99


def test_batches_are_of_the_training_part() -> None:
    task = Digits(held=0.5)
    drawn, labels = task.batch(3000, seeded())
    assert rows_of(drawn) <= rows_of(task.parts[0])
    assert not rows_of(drawn) & rows_of(task.test[0])
    assert set(labels.tolist()) == set(range(10))


def test_chance_and_baseline() -> None:
    task = Digits()
    images, labels, test, answers = task.parts
    counts = [int((labels == digit).sum()) for digit in range(10)]
    usual = counts.index(max(counts))
    assert task.chance == pytest.approx(sum(a == usual for a in answers.tolist()) / len(answers))
    means = [images[labels == digit].mean(0) for digit in range(10)]
    right = 0
    for image, answer in zip(test, answers.tolist(), strict=True):
        right += min(range(10), key=lambda d: float((image - means[d]).square().sum())) == answer
    assert task.baseline == pytest.approx(right / len(test))
    assert 0.09 < task.chance < 0.12
    assert 0.85 < task.baseline < 0.95


def test_same_seed_same_batch() -> None:
    assert repeatable(Digits())


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "saccade\[tasks\]"'):
        Digits().batch(1, seeded())


@pytest.mark.parametrize("wrong", [{"side": 0}, {"held": 0.0}, {"held": 1.0}])
def test_bad_arguments(wrong: dict) -> None:
    with pytest.raises(ValueError, match="held-out share between 0 and 1, got"):
        Digits(**wrong)
