"""Handwritten digits that scikit-learn bundles, as images, rows of pixels, or one long sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import interpolate

LEVELS = 17


@dataclass(frozen=True)
class Digits:
    """1,797 digits of 8 by 8 pixels in 17 grey levels, resampled to `side`; a share `held` of each digit is for testing only.

    `seed` decides which, so that what was tuned on one split can be tested on another. Written by 13 people (Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, 1998), whose names are not in
    the data: the parts share writers but no image. The metric is `recall.accuracy` on `test`.
    """

    side: int = 8
    held: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side < 1 or not 0 < self.held < 1:
            raise ValueError(
                f"digits needs a side of at least 1 and a held-out share between 0 and 1, got "
                f"{self.side} and {self.held}"
            )

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images and labels, test images and labels; images (n, 1, side, side) float32 on [0, 1].

        Raises ImportError where scikit-learn is absent.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ImportError('digits come with scikit-learn: pip install "saccade[tasks]"') from None
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / (LEVELS - 1)
        labels = torch.tensor(data.target, dtype=torch.long)
        if self.side != 8:
            images = interpolate(images, (self.side, self.side), mode="bilinear", antialias=self.side < 8)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        order = order[labels[order].argsort(stable=True)]
        steps = (torch.arange(len(order) + 1) * self.held).floor()
        test = torch.zeros(len(order), dtype=torch.bool).scatter(0, order, steps.diff() > 0)
        return images[~test], labels[~test], images[test], labels[test]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """All held-out images (n, 1, side, side) and labels (n,)."""
        return self.parts[2], self.parts[3]

    @property
    def chance(self) -> float:
        """Test accuracy of the most frequent digit of the training part."""
        usual = self.parts[1].bincount().argmax()
        return float((self.parts[3] == usual).float().mean())

    @property
    def baseline(self) -> float:
        """Test accuracy of the digit whose mean training image is nearest."""
        images, labels, test, answers = self.parts
        means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
        return float(((test[:, None] - means).flatten(2).norm(dim=-1).argmin(1) == answers).float().mean())

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training images (size, 1, side, side) float32 and labels (size,) int64, drawn with repetition."""
        images, labels = self.parts[:2]
        drawn = torch.randint(len(images), (size,), generator=generator)
        return images[drawn], labels[drawn]

    def pixels(self, images: Tensor) -> Tensor:
        """Images as tokens in reading order, (size, side * side) int64, one of 17 grey levels each."""
        return (images * (LEVELS - 1)).round().long().flatten(1)

    def rows(self, images: Tensor) -> Tensor:
        """Images as `side` tokens of `side` pixels each, (size, side, side)."""
        return images[:, 0]
