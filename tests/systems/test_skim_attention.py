"""S161, Skim-Attention: weights from the boxes of the words alone, computed once for all layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.nn.skim import SkimAttention, skimming_mask
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import flops, train

SIZE, ROWS, NAMES = 24, 6, 8
MASK = 2 * NAMES
pytestmark = pytest.mark.system("S161")


def pages(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Forms whose rows are a label and its value to the right, in shuffled reading order; half of the values are hidden.

    Label l has the value NAMES + l. Tokens (B, 2 ROWS), boxes (B, 2 ROWS, 4), and targets, SILENT where nothing is hidden.
    """
    labels = torch.randint(NAMES, (batch, ROWS), generator=generator)
    hidden = torch.rand(batch, ROWS, generator=generator).argsort(1) < ROWS // 2
    tokens = torch.cat((labels, torch.where(hidden, MASK, labels + NAMES)), 1)
    targets = torch.cat((torch.full_like(labels, SILENT), torch.where(hidden, labels + NAMES, SILENT)), 1)
    x = torch.randint(4, (batch, 2 * ROWS), generator=generator)
    x[:, ROWS:] += SIZE // 2
    y = torch.rand(batch, SIZE // 2, generator=generator).argsort(1)[:, :ROWS].repeat(1, 2) * 2
    boxes = torch.stack((x, y, x + 6, y + 1), -1)
    order = torch.rand(batch, 2 * ROWS, generator=generator).argsort(1)
    return (
        tokens.gather(1, order),
        boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)),
        targets.gather(1, order),
    )


def test_the_weights_by_loops() -> None:
    skim = SkimAttention(8, 2, SIZE).double()
    _, boxes, _ = pages(1, torch.Generator().manual_seed(0))
    layout = []
    for x0, y0, x1, y1 in boxes[0].tolist():
        sides = (x0, y0, x1, y1, x1 - x0, y1 - y0)
        layout.append(sum(t.weight[s] for t, s in zip(skim.boxes.tables, sides, strict=True)))
    found = skim(boxes)
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        for i, a in enumerate(layout):
            q = (skim.query_proj.weight @ a)[own]
            s = torch.stack([q @ (skim.key_proj.weight @ b)[own] / 2 for b in layout])
            torch.testing.assert_close(found[0, h, i], torch.softmax(s, 0), atol=1e-12, rtol=0)


def test_words_leave_the_weights_bit_identical_and_boxes_change_them() -> None:
    model, seen = sc.nn.Skimformer(MASK + 1, dim=16, size=SIZE), []
    model.skim.register_forward_hook(lambda module, given, found: seen.append(found))
    tokens, boxes, _ = pages(2, torch.Generator().manual_seed(0))
    moved = boxes.clone()
    moved[:, 3, 0::2] += 1
    for words, where in ((tokens, boxes), (tokens.flip(1), boxes), (tokens, moved)):
        model(words, where)
    assert len(seen) == 3, "the weights are computed once a page"
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)


def test_products_of_queries_and_keys_fall_by_all_layers_but_one() -> None:
    tokens, boxes, _ = pages(1, torch.Generator().manual_seed(0))
    n, dim, depth = 2 * ROWS, 16, 4
    one, four = (sc.nn.Skimformer(MASK + 1, dim, d, size=SIZE) for d in (1, depth))
    added = flops(lambda: four(tokens, boxes)) - flops(lambda: one(tokens, boxes))
    mixing, maps = 2 * n * n * dim, 2 * n * dim * dim * (2 + 8)
    assert added == (depth - 1) * (mixing + maps)
    products = flops(lambda: four.skim(boxes)) - 2 * (2 * n * dim * dim)
    assert products == 2 * n * n * dim


def test_a_skimming_mask_keeps_the_top_keys_of_another_model() -> None:
    skim = SkimAttention(16, 4, SIZE)
    _, boxes, _ = pages(2, torch.Generator().manual_seed(0))
    w = skim(boxes)
    mask = skimming_mask(w, 5)
    assert mask.shape == (2, 1, 12, 12)
    assert bool((mask.sum(-1) == 5).all())
    mean = w.mean(1, keepdim=True)
    assert bool((mean.masked_fill(~mask, math.inf).amin(-1) >= mean.masked_fill(mask, 0).amax(-1)).all())
    layer, x = sc.nn.Attention(16, 4), torch.randn(2, 12, 16)
    used = layer(x, mask=mask, need=("weights",)).weights
    assert bool((used[~mask.expand_as(used)] == 0).all())
    torch.testing.assert_close(layer(x, mask=skimming_mask(w, 99)), layer(x))
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        skimming_mask(w, 0)


def test_padding_is_not_read() -> None:
    model = sc.nn.Skimformer(MASK + 1, dim=16, size=SIZE).double()
    tokens, boxes, _ = pages(2, torch.Generator().manual_seed(0))
    found = model(tokens, boxes, torch.tensor([12, 7]))
    torch.testing.assert_close(found[1:, :7], model(tokens[1:, :7], boxes[1:, :7]), atol=1e-12, rtol=0)


def test_bad_boxes_are_refused() -> None:
    skim = SkimAttention(8, 2, 10)
    with pytest.raises(ValueError, match=r"must lie in 0..9, got 0 to 10"):
        skim(torch.tensor([[[0, 0, 10, 1]]]))
    with pytest.raises(ValueError, match="x0 <= x1 and y0 <= y1"):
        skim(torch.tensor([[[5, 0, 4, 1]]]))
    with pytest.raises(ValueError, match="dim=9 must be a multiple of heads=2"):
        SkimAttention(9, 2, 10)


def filled(layout: bool, steps: int = 250) -> float:
    """Accuracy of hidden values, by a model that sees boxes or by one that sees the reading order."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    skim = sc.nn.Skimformer(MASK + 1, dim=32, depth=2, heads=4, size=SIZE)
    text = sc.nn.Encoder(MASK + 1, dim=32, depth=2, heads=4, max_length=2 * ROWS)
    torch.nn.init.normal_(text.embedding.tokens.weight, std=32**-0.5)

    def logits(tokens: Tensor, boxes: Tensor) -> Tensor:
        return skim(tokens, boxes) if layout else text(tokens) @ text.embedding.tokens.weight.T

    def loss(step: int) -> Tensor:
        tokens, boxes, targets = pages(32, generator)
        return F.cross_entropy(logits(tokens, boxes).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train((skim if layout else text).parameters(), loss, steps, rate=5e-3)
    tokens, boxes, targets = pages(512, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(logits(tokens, boxes), targets)


def test_forms_in_shuffled_order_are_filled_by_layout_and_not_by_order() -> None:
    by_layout, by_order = filled(True), filled(False)
    assert by_layout >= 0.95
    assert by_layout >= by_order + 0.1
