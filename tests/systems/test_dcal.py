"""S300, DCAL: cross-attention from relevant patches, and over pairs of images in training alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from systems.helpers import flops, train

pytestmark = pytest.mark.system("S300")


def model_of(share: float = 0.25, depth: int = 2) -> sc.nn.DCAL:
    return sc.nn.DCAL(4, size=16, patch=4, dim=8, depth=depth, heads=2, share=share).double()


def pictures(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16, 16, dtype=torch.float64)


def read(block: sc.nn.PairBlock, query: Tensor, keys: Tensor) -> Tensor:
    """A block of one query row (dim) over rows (n, dim), head by head."""
    layer, normed = block.attention, block.norm1(keys)
    q, heads = layer.query_proj(block.norm1(query)), []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        w = torch.softmax(layer.key_proj(normed)[:, own] @ q[own] / 2, 0)
        heads.append((w[:, None] * layer.value_proj(normed)[:, own]).sum(0))
    x = query + layer.out_proj(torch.cat(heads))
    return x + block.feed_forward(block.norm2(x))


def test_rollout_by_loops_and_its_rows_sum_to_one() -> None:
    weights = [torch.softmax(torch.randn(2, 3, 5, 5, dtype=torch.float64), -1) for _ in range(3)]
    found = sc.nn.attention_rollout(weights)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    for b in range(2):
        flow = {(i, j): float(i == j) for i in range(5) for j in range(5)}
        for w in weights:
            step = {(i, j): 0.5 * float(w[b, :, i, j].mean()) + 0.5 * (i == j) for i, j in flow}
            flow = {(i, j): sum(step[i, m] * flow[m, j] for m in range(5)) for i, j in flow}
        expected = torch.tensor([[flow[i, j] for j in range(5)] for i in range(5)], dtype=torch.float64)
        torch.testing.assert_close(found[b], expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="at least one layer"):
        sc.nn.attention_rollout([])


def test_chosen_rows_and_pairs_row_by_row_with_gradients() -> None:
    block = sc.nn.PairBlock(8, 2).double()
    x, other = (torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rows = torch.tensor([[0, 3], [0, 1]])
    local = torch.stack([torch.stack([read(block, x[b, r], x[b]) for r in rows[b]]) for b in range(2)])
    pair = torch.stack(
        [torch.stack([read(block, y, torch.cat((x[b], other[b]))) for y in x[b]]) for b in range(2)]
    )
    leaves = [x, other, *block.parameters()]
    for found, expected in ((block.local(x, rows), local), (block.pair(x, other), pair)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        grads = [torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True) for y in (found, expected)]
        for got, wanted in zip(*grads, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


def test_all_rows_with_the_weights_of_self_attention_are_self_attention() -> None:
    model, images = model_of(share=1.0), pictures()
    model.local.load_state_dict(model.blocks[-1].state_dict())
    x = model.embed(images)
    first, weights = model.blocks[0](x)
    rows = model.relevant([weights])
    assert torch.equal(rows.sort(-1).values, torch.arange(17).expand(3, -1))
    whole = model.blocks[1](first)[0].gather(1, rows.unsqueeze(-1).expand(-1, -1, 8))
    torch.testing.assert_close(model.local.local(first, rows), whole, atol=1e-12, rtol=0)


def test_a_masked_second_image_leaves_self_attention() -> None:
    block = sc.nn.PairBlock(8, 2).double()
    x, other = (torch.randn(3, 5, 8, dtype=torch.float64) for _ in range(2))
    found = block.pair(x, other, torch.tensor([False, True, False]))
    torch.testing.assert_close(found[::2], block(x)[0][::2], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1], block.pair(x, other)[1], atol=1e-12, rtol=0)
    assert (found[1] - block(x)[0][1]).abs().max() > 1e-3


def test_the_patches_that_reached_the_class_token_are_chosen() -> None:
    model = model_of(share=3 / 16)
    weights = [torch.softmax(torch.randn(2, 2, 17, 17, dtype=torch.float64), -1) for _ in range(2)]
    reached = sc.nn.attention_rollout(weights)[:, 0]
    for rows, row in zip(model.relevant(weights), reached, strict=True):
        best = sorted(range(1, 17), key=lambda j: -float(row[j]))[:3]
        assert rows.tolist() == [0, *best]


def test_pairs_cost_nothing_outside_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = model_of(), pictures(), torch.tensor([0, 1, 2])
    plain = flops(lambda: model.loss(images, labels))
    assert flops(lambda: model(images)) == plain
    assert flops(lambda: model.loss(images, labels, torch.tensor([1, 2, 0]))) > plain

    def refuse(*given: object) -> None:
        raise AssertionError("pairs in inference")

    monkeypatch.setattr(sc.nn.PairBlock, "pair", refuse)
    p = model.predict(images)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=torch.float64))


def test_pairs_have_no_weights_of_their_own_and_losses_are_weighed_by_doubt() -> None:
    model, images, labels = model_of(), pictures(), torch.tensor([0, 1, 2])
    other = torch.tensor([1, 2, 0])
    names = {n.split(".")[0] for n, _ in model.named_parameters()}
    assert names == {"first", "places", "patches", "blocks", "local", "norms", "heads", "doubt"}
    even = 2 * model.loss(images, labels, other)
    torch.nn.init.constant_(model.doubt, 0.7)
    expected = (even * torch.tensor(-0.7).double().exp() + 3 * 0.7) / 2
    torch.testing.assert_close(model.loss(images, labels, other), expected, atol=1e-7, rtol=0)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="an image of 30 x 30 is not made of patches of 4 x 4"):
        sc.nn.DCAL(4, size=30)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"above 0 and at most 1, got {share}"):
            sc.nn.DCAL(4, share=share)


CLASSES, FEW = 4, 48


def birds(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One disc somewhere in noise, (batch, 1, 32, 32); its class is the pattern of a mark of 2 x 2 pixels inside it."""
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    x, y = torch.randint(8, 24, (2, batch, 1, 1), generator=generator)
    at = torch.arange(32)
    disc = ((at[:, None] - y) ** 2 + (at - x) ** 2 <= 49).float()
    images = disc + 0.1 * torch.randn(batch, 32, 32, generator=generator)
    marks = torch.tensor([[[1, 1], [-1, -1]], [[-1, -1], [1, 1]], [[1, -1], [1, -1]], [[-1, 1], [-1, 1]]])
    dx, dy = torch.randint(-4, 4, (2, batch), generator=generator)
    rows, cols = (y[:, 0, 0] + dy) // 4 * 4 + 1, (x[:, 0, 0] + dx) // 4 * 4 + 1
    for a in range(2):
        for b in range(2):
            images[torch.arange(batch), rows + a, cols + b] += 1.2 * marks[labels, a, b]
    return images[:, None], labels


def recognised(dual: bool, seed: int, steps: int) -> float:
    """Accuracy of the whole model, or of self-attention trained alone."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = sc.nn.DCAL(CLASSES, dim=32, depth=2, heads=2, channels=1, share=0.1)

    few, names = birds(FEW, generator)

    def loss(step: int) -> Tensor:
        drawn = torch.randint(FEW, (32,), generator=generator)
        images, labels = few[drawn], names[drawn]
        if dual:
            return model.loss(images, labels, torch.randperm(32, generator=generator))
        return torch.nn.functional.cross_entropy(model(images)[0], labels)

    train(model.parameters(), loss, steps, rate=2e-3)
    images, labels = birds(512, torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        scores = model.predict(images) if dual else model(images)[0]
    return float((scores.argmax(-1) == labels).float().mean())


def test_a_mark_of_four_pixels_is_recognised_from_few_images() -> None:
    assert recognised(dual=True, seed=1, steps=160) >= 0.6


@pytest.mark.slow
def test_three_seeds_against_self_attention_alone() -> None:
    dual, plain = (sum(recognised(d, seed, steps=160) for seed in range(3)) / 3 for d in (True, False))
    assert dual >= plain + 0.02
