"""S064, Pervasive Attention: causal convolutions over the grid of source and target."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.tasks.copy import Copy
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import train

pytestmark = pytest.mark.system("S064")


def network(pooling: str = "max", width: int = 3, depth: int = 2) -> sc.nn.PervasiveAttention:
    """A small network in float64 whose norms have seen some data, for inference."""
    model = sc.nn.PervasiveAttention(11, dim=4, depth=depth, growth=3, width=width, pooling=pooling).double()
    for _ in range(3):
        model(*tokens())
    return model.eval()


def tokens(batch: int = 4, sources: int = 6, targets: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (batch, sources)), torch.randint(11, (batch, targets))


def norm_by_hand(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean[:, None, None]) * gain[:, None, None] + norm.bias[:, None, None]


def written_out(model: sc.nn.PervasiveAttention, source: Tensor, target: Tensor) -> Tensor:
    """One pair of strings, cell by cell."""
    rows, cols = len(target), len(source)
    x = torch.stack(
        [
            torch.stack([torch.cat((model.target.weight[y], model.source.weight[s])) for s in source])
            for y in target
        ]
    ).permute(2, 0, 1)
    for layer in model.layers:
        h = torch.einsum(
            "oc,cts->ots", layer.squeeze.weight[:, :, 0, 0], F.relu(norm_by_hand(layer.norm1, x))
        )
        h = F.relu(norm_by_hand(layer.norm2, h))
        kernel = layer.conv.weight
        up, side = kernel.shape[2] - 1, kernel.shape[3] // 2
        new = torch.zeros(len(kernel), rows, cols, dtype=x.dtype)
        for i in range(rows):
            for j in range(cols):
                for a in range(-up, 1):
                    for b in range(-side, side + 1):
                        if i + a >= 0 and 0 <= j + b < cols:
                            new[:, i, j] += kernel[:, :, a + up, b + side] @ h[:, i + a, j + b]
        x = torch.cat((x, new))
    x = F.relu(norm_by_hand(model.norm, x))
    if model.score is None:
        pooled = x.max(-1).values
    else:
        s = torch.einsum("c,cts->ts", model.score.weight[0, :, 0, 0], x) + model.score.bias
        pooled = torch.einsum("ts,cts->ct", torch.softmax(s, -1), x)
    return model.out_proj(pooled.T)


@pytest.mark.parametrize(("pooling", "width"), [("max", 3), ("attention", 3), ("max", 1), ("attention", 5)])
def test_the_network_cell_by_cell(pooling: str, width: int) -> None:
    model, (source, target) = network(pooling, width), tokens(1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(source, target)[0], written_out(model, source[0], target[0]), atol=1e-12, rtol=0
        )


def test_gradients_agree_with_central_differences() -> None:
    model, (source, target) = network("attention"), tokens(2)
    weight = model.layers[1].conv.weight

    def value(w: Tensor) -> Tensor:
        own = {"layers.1.conv.weight": w}
        return torch.func.functional_call(model, own, (source, target)).sin().sum()

    assert torch.autograd.gradcheck(value, weight.detach().clone().requires_grad_())


@pytest.mark.parametrize("pooling", ["max", "attention"])
def test_a_later_target_token_leaves_earlier_rows_bit_equal(pooling: str) -> None:
    model, (source, target) = network(pooling), tokens(targets=8)
    first = model(source, target)
    for i in (1, 4, 7):
        other = target.clone()
        other[:, i] = (other[:, i] + 1) % 11
        found = model(source, other)
        assert torch.equal(found[:, :i], first[:, :i])
        assert not torch.equal(found[:, i], first[:, i])


@pytest.mark.parametrize("pooling", ["max", "attention"])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_steps_on_cached_rows_equal_the_whole(pooling: str, width: int) -> None:
    model, (source, target) = network(pooling, width, depth=3), tokens(targets=9)
    lengths = torch.tensor([6, 3, 1, 5])
    state, outs = model.begin(source, lengths), []
    for piece in target.split([1, 1, 4, 2, 1], 1):
        out, state = model.step(piece, state)
        outs.append(out)
        assert all(r.shape[2] == width // 2 for r in state.rows)
    torch.testing.assert_close(torch.cat(outs, 1), model(source, target, lengths), atol=1e-12, rtol=0)


@pytest.mark.parametrize("pooling", ["max", "attention"])
def test_padding_changes_neither_results_nor_statistics(pooling: str) -> None:
    model, (source, target) = network(pooling), tokens()
    sizes, rows = torch.tensor([6, 2, 4, 1]), torch.tensor([5, 3, 5, 2])
    found = model(source, target, sizes, rows)
    for b in range(4):
        alone = model(source[b : b + 1, : sizes[b]], target[b : b + 1, : rows[b]])
        torch.testing.assert_close(found[b : b + 1, : rows[b]], alone, atol=1e-12, rtol=0)
    model.train()
    before = model(source, target, sizes, rows)
    longer = [torch.cat((x, torch.randint(11, (4, 3))), 1) for x in (source, target)]
    after = model(*longer, sizes, rows)
    inside = torch.arange(5) < rows[:, None]
    torch.testing.assert_close(after[:, :5][inside], before[inside], atol=1e-12, rtol=0)


def test_greedy_decoding_follows_its_own_tokens() -> None:
    model, (source, _) = network(), tokens()
    found = model.greedy(source, start=10, length=5)
    shifted = torch.cat((torch.full((4, 1), 10), found[:, :-1]), 1)
    assert torch.equal(model(source, shifted).argmax(-1), found)


@pytest.mark.parametrize("pooling", ["max", "attention"])
def test_alignments_are_shares_of_a_row_over_real_source_tokens(pooling: str) -> None:
    model, (source, target) = network(pooling), tokens()
    share = model.align(source, target, torch.tensor([6, 2, 4, 1]))
    torch.testing.assert_close(share.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    assert bool((share[1, :, 2:] == 0).all())
    assert bool((share[3, :, 0] == 1).all())


def test_what_it_cannot_do_is_refused() -> None:
    for options in ({"width": 2}, {"depth": 0}, {"growth": 0}):
        with pytest.raises(ValueError, match=r"must be at least 1 and width an odd number, got"):
            sc.nn.PervasiveAttention(11, **options)
    with pytest.raises(ValueError, match="pooling must be one of max, attention, got 'mean'"):
        sc.nn.PervasiveAttention(11, pooling="mean")
    model, (source, target) = network(), tokens()
    with pytest.raises(ValueError, match="at least one source token"):
        model(source, target, torch.tensor([6, 0, 1, 2]))
    with pytest.raises(ValueError, match="4 sources need as many targets, got 3"):
        model(source, target[:3])
    with pytest.raises(sc.NotSupported, match=r"call eval\(\) before decoding"):
        model.train().step(target[:, :1], model.begin(source))


def reversed_strings(width: int, steps: int, length: int = 6, seed: int = 0) -> tuple[float, float]:
    """Accuracy of strings written backwards, and how often the pooling's greatest weight is at the token to be written."""
    torch.manual_seed(seed)
    task, generator = Copy(length, reverse=True), torch.Generator().manual_seed(seed)
    model = sc.nn.PervasiveAttention(task.vocab, 16, depth=3, growth=16, width=width, pooling="attention")

    def loss(step: int) -> Tensor:
        source, _, target = task.pairs(32, generator)
        logits = model(source, task.shifted(target))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=4e-3)
    model.eval()
    source, _, target = task.pairs(512, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        right = accuracy(model(source, task.shifted(target)), target)
        at = model.align(source, task.shifted(target))[:, :length].argmax(-1)
    return right, float((at == length - 1 - torch.arange(length)).float().mean())


def test_strings_are_reversed_by_their_surroundings_and_not_by_a_bag_of_tokens() -> None:
    right, aligned = reversed_strings(width=5, steps=450)
    assert right >= 0.7
    assert aligned >= 0.7
    assert reversed_strings(width=1, steps=150)[0] <= 0.5
