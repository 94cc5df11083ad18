"""S266, PowerAttention: blocks a power of two back, so that what layers reach together grows exponentially."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.needle import Needle
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import dense, qkv, stepwise, train

pytestmark = pytest.mark.system("S266")


def mask(length: int, block: int, local: int, sinks: int) -> Tensor:
    """Who reads whom, written out."""
    exist = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            gap = i // block - j // block
            exist[i, j] = gap < local or gap in {1, 2, 4, 8, 16, 32, 64} or j // block < sinks
    return exist


@pytest.mark.parametrize("kernel", ["chunk", "slab", None])
@pytest.mark.parametrize(("block", "local", "sinks"), [(4, 1, 0), (4, 3, 1), (7, 2, 2), (1, 1, 0)])
def test_every_path_equals_masked_attention_and_its_gradients(
    kernel: str | None, block: int, local: int, sinks: int
) -> None:
    leaves = [x.requires_grad_() for x in qkv(2, 4, 97, 8, kv=2)]
    found = sc.attend(*leaves, f"powerattention({block}, local={local}, sinks={sinks})", kernel=kernel)
    truth = dense(*leaves, mask(97, block, local, sinks))
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), leaves) for x in (found, truth)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_layers_reach_all_distances_below_the_next_but_one_power() -> None:
    found = sc.receptive_field("powerattention(1)", 512, layers=7)
    assert found.reach == tuple(2 ** (d + 1) - 2 for d in range(1, 8))
    assert sc.receptive_field("powerattention(1)", 512).hops == 9 == math.log2(512)
    window = sc.receptive_field("window(10)", 512)
    assert window.reach[:7] == tuple(9 * d for d in range(1, 8))


def test_a_row_reads_a_logarithm_of_the_blocks() -> None:
    for length in (256, 1024, 4096):
        q = torch.zeros(1, 1, length, 1)
        blocks = length // 16
        last = sc.attend(q[:, :, -1:], q, q, "powerattention(16)", need="weights").weights
        assert int((last > 0).sum()) == 16 * (1 + int(math.log2(blocks - 1)) + 1)


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(32, 4, "powerattention(4, sinks=1)").double()
    x = torch.randn(2, 43, 32, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_bad_arguments() -> None:
    with pytest.raises(sc.MechanismError, match="sinks must be a whole number of at least 0, got -1"):
        sc.mechanism("powerattention(sinks=-1)")


def found_needles(mechanism: str, steps: int) -> float:
    """Accuracy of three layers that look for a needle anywhere in 40 tokens."""
    torch.manual_seed(0)
    task = Needle(length=40, needles=1, queries=1, keys=4, values=4)
    generator = torch.Generator().manual_seed(0)
    model = sc.nn.Transformer(task.vocab, dim=32, depth=3, heads=2, mechanism=mechanism, max_length=40)
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    tokens, targets = task.batch(512, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_a_needle_is_found_where_a_window_of_as_many_keys_does_not_reach() -> None:
    assert found_needles("powerattention(1)", 500) > found_needles("window(7)", 500) + 0.12
