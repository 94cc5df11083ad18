"""S269, sentence attention block: channels gated by a question, so that a decoder outlines what the question means."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from systems.helpers import train

pytestmark = pytest.mark.system("S269")
SIDE, OBJECT = 16, 5
COLOURS, SHAPES, SIDES = 3, 3, 2
WORDS = COLOURS + SHAPES + SIDES


def test_an_all_ones_gate_is_the_identity() -> None:
    layer = sc.nn.SentenceGate(8, sentence_dim=5)
    nn.init.zeros_(layer.excite.weight)
    nn.init.constant_(layer.excite.bias, 30.0)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(layer(x, torch.randn(2, 5)), x, atol=1e-6, rtol=0)


def test_the_gate_follows_the_sentence_and_the_mean_of_the_map() -> None:
    layer = sc.nn.SentenceGate(8, sentence_dim=5)
    x, e = torch.randn(2, 8, 6, 6), torch.randn(2, 5)
    assert (layer.gate(x, e) - layer.gate(x, e + 1)).abs().amax() > 1e-3
    assert (layer.gate(x, e) - layer.gate(x + 1, e)).abs().amax() > 1e-3
    same_mean = x + torch.randn(2, 8, 6, 6)
    same_mean = same_mean - (same_mean - x).mean((-1, -2), keepdim=True)
    torch.testing.assert_close(layer.gate(same_mean, e), layer.gate(x, e), atol=1e-5, rtol=0)


def test_by_itself_it_knows_no_place() -> None:
    layer = sc.nn.SentenceGate(8, sentence_dim=5)
    x, e = torch.randn(2, 8, 6, 6), torch.randn(2, 5)
    moved = torch.randperm(36)
    found = layer(x.flatten(2)[..., moved].view_as(x), e)
    torch.testing.assert_close(found, layer(x, e).flatten(2)[..., moved].view_as(x))


def stamps() -> Tensor:
    """A square, a disc and a cross, (SHAPES, OBJECT, OBJECT)."""
    at = torch.arange(OBJECT) - (OBJECT - 1) / 2
    disc = at[:, None] ** 2 + at**2 < 6
    cross = (at.abs()[:, None] < 1) | (at.abs() < 1)
    return torch.stack((torch.ones(OBJECT, OBJECT, dtype=torch.bool), disc, cross))


@cache
def scenes(size: int, seed: int, sides: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (size, 3, SIDE, SIDE) of four objects, one a quarter, and two questions with their masks about each.

    A question (size, 2, WORDS) counts its words: a colour and a shape, or, with `sides`, a shape and a side; its mask
    (size, 2, SIDE, SIDE) covers the objects that it means, of which there is at least one. The first object answers
    the first question, the second another.
    """
    generator = torch.Generator().manual_seed(seed)
    half = SIDE // 2
    kinds = torch.rand(size, COLOURS * SHAPES, generator=generator).argsort(1)[:, :4]
    quarter = torch.rand(size, 4, generator=generator).argsort(1)
    shift = torch.randint(0, half - OBJECT + 1, (size, 4, 2), generator=generator)
    place = torch.zeros(size, 4, SIDE, SIDE, dtype=torch.bool)
    shapes = stamps()
    for n in range(size):
        for thing in range(4):
            row, column = (
                int(x)
                for x in shift[n, thing] + half * torch.stack((quarter[n, thing] // 2, quarter[n, thing] % 2))
            )
            place[n, thing, row : row + OBJECT, column : column + OBJECT] = shapes[kinds[n, thing] % SHAPES]
    colour, shape, side = kinds // SHAPES, kinds % SHAPES, quarter % 2
    images = (F.one_hot(colour, COLOURS)[..., None, None] * place[:, :, None]).sum(1).float()
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    second = side if sides else colour
    wanted = (shape[:, :2, None] == shape[:, None]) & (second[:, :2, None] == second[:, None])
    masks = (wanted[..., None, None] & place[:, None]).any(2).float()
    words = F.one_hot(COLOURS + shape[:, :2], WORDS) + F.one_hot(
        COLOURS + SHAPES + second[:, :2] if sides else second[:, :2], WORDS
    )
    return images, words.float(), masks, wanted


class Grounder(nn.Module):
    """Three stages, a sentence gate after each; their maps, at the first one's size, fuse to one mask of logits."""

    def __init__(self, coordinates: bool = False, width: int = 16, sentence_dim: int = 16) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.sentence = nn.Linear(WORDS, sentence_dim)
        before = 3 + 2 * coordinates
        self.stages, self.gates = nn.ModuleList(), nn.ModuleList()
        for n in range(3):
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(
                        before if n == 0 else width,
                        width,
                        3,
                        stride=1 if n == 0 else 2,
                        padding=1,
                        bias=False,
                    ),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                )
            )
            self.gates.append(sc.nn.SentenceGate(width, sentence_dim))
        self.fuse = nn.Sequential(
            nn.Conv2d(3 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1)
        )

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        e = self.sentence(words)
        if self.coordinates:
            at = torch.linspace(-1, 1, SIDE)
            x = torch.cat(
                (x, at.expand(len(x), 1, SIDE, SIDE), at[:, None].expand(len(x), 1, SIDE, SIDE)), dim=1
            )
        maps = []
        for stage, gate in zip(self.stages, self.gates, strict=True):
            x = gate(stage(x), e)
            maps.append(F.interpolate(x, size=(SIDE, SIDE), mode="bilinear"))
        return self.fuse(torch.cat(maps, dim=1)).squeeze(1)


def overlap_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus Dice."""
    p = logits.sigmoid()
    dice = 1 - (2 * (p * masks).sum((1, 2)) + 1) / (p.sum((1, 2)) + masks.sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + dice.mean()


def learned(steps: int, told: bool = True, sides: bool = False, coordinates: bool = False) -> Grounder:
    """A network trained on both questions of an image; without being told it, the words are zeros."""
    torch.manual_seed(0)
    model, generator = Grounder(coordinates), torch.Generator().manual_seed(0)
    images, words, masks, _ = scenes(1500, 0, sides)

    def loss(step: int) -> Tensor:
        n = torch.randint(0, len(images), (16,), generator=generator)
        asked = words[n].flatten(0, 1) * told
        return overlap_loss(model(images[n].repeat_interleave(2, 0), asked), masks[n].flatten(0, 1))

    train(model.parameters(), loss, steps, rate=2e-2)
    return model.eval()


@torch.no_grad()
def answers(model: Grounder, told: bool = True, sides: bool = False, cut: float = 0.0) -> tuple[float, float]:
    """Mean intersection over union, and how often another question about the same image gives another mask.

    A mask is another one where it shares less than half with the first; two questions that mean the same objects are
    left out.
    """
    images, words, masks, wanted = scenes(400, 1, sides)
    found = torch.stack([model(images, words[:, q] * told) > cut for q in range(2)], dim=1)

    def shared(a: Tensor, b: Tensor) -> Tensor:
        return (a & b).sum((-1, -2)) / (a | b).sum((-1, -2)).clamp_min(1)

    differ = (wanted[:, 0] != wanted[:, 1]).any(-1)
    other = (shared(found[:, 0], found[:, 1]) < 0.5) & found.any(1).flatten(1).any(1)
    return float(shared(found, masks.bool()).mean()), float(other[differ].float().mean())


def test_the_mask_follows_the_question() -> None:
    model, deaf = learned(700), learned(100, told=False)
    (iou, other), blind = answers(model), max(answers(deaf, told=False, cut=c)[0] for c in (0.0, -1.0, -2.0))
    print(f"intersection over union {iou:.3f}, without the question {blind:.3f}; other masks {other:.3f}")
    assert iou >= 0.7
    assert iou >= blind + 0.2
    assert other >= 0.9


@pytest.mark.slow
def test_sides_are_found_even_without_coordinates() -> None:
    """Gates alone know no place, but strides and borders of zeros tell the convolutions where things are."""
    plain, told = (answers(learned(400, sides=True, coordinates=c), sides=True)[0] for c in (False, True))
    print(f"sides: {plain:.3f} without coordinates, {told:.3f} with them")
    assert plain >= 0.6
    assert told >= 0.5
