"""S288, S2-Attention: local blocks, and stripes of blocks that the heads share among themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.needle import Needle
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import dense, qkv, stepwise, train

pytestmark = pytest.mark.system("S288")


def mask(
    length: int, heads: int, block: int, local: int, stripes: int, step: int = 1, share: int = 1
) -> Tensor:
    """Who reads whom, (heads, length, length), written out."""
    exist = torch.zeros(heads, length, length, dtype=torch.bool)
    for h in range(heads):
        for i in range(length):
            for j in range(i + 1):
                near = i // block - j // block < local
                stripe = (j // block + h // share * step) % stripes == 0
                exist[h, i, j] = near or stripe
    return exist


@pytest.mark.parametrize("kernel", ["chunk", "slab", None])
@pytest.mark.parametrize(
    ("block", "local", "stripes", "step", "share"), [(4, 2, 4, 1, 1), (5, 1, 3, 2, 2), (16, 1, 2, 1, 1)]
)
def test_every_path_equals_masked_attention_and_its_gradients(
    kernel: str | None, block: int, local: int, stripes: int, step: int, share: int
) -> None:
    leaves = [x.requires_grad_() for x in qkv(2, 4, 61, 8)]
    text = f"s2_attention({block}, local={local}, stripes={stripes}, step={step}, share={share})"
    found = sc.attend(*leaves, text, kernel=kernel)
    truth = dense(*leaves, mask(61, 4, block, local, stripes, step, share))
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), leaves) for x in (found, truth)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("heads", "stripes"), [(4, 4), (8, 4), (8, 8)])
def test_the_heads_together_read_every_past_block(heads: int, stripes: int) -> None:
    q, k, v = qkv(1, heads, 64, 8)
    w = sc.attend(q, k, v, f"s2_attention(4, local=1, stripes={stripes})", need="weights").weights
    assert torch.equal((w > 0).any(1)[0], torch.ones(64, 64, dtype=torch.bool).tril())
    assert sc.receptive_field(f"s2_attention(4, local=1, stripes={stripes})", 64, heads=heads).hops == 1
    few = sc.attend(q, k, v, f"s2_attention(4, local=1, stripes={2 * heads})", need="weights").weights
    assert not torch.equal((few > 0).any(1)[0], torch.ones(64, 64, dtype=torch.bool).tril())


def test_keys_that_no_head_of_a_group_will_read_can_be_freed() -> None:
    q, k, v = qkv(1, 4, 48, 8, kv=2)
    text = "s2_attention(4, local=2, stripes=4, share=2)"
    whole = sc.attend(q, k, v, text)
    now = 40
    block = torch.arange(now) // 4
    kept = torch.stack([(now // 4 - block < 2) | ((block + g) % 4 == 0) for g in range(2)])
    assert kept.double().mean() < 0.5
    state = sc.attend(q[:, :, :now], k[:, :, :now], v[:, :, :now], text, need="state").state
    for x in state.tensors.values():
        x[0, ~kept] = 1e6 * torch.randn_like(x[0, ~kept])
    for t in range(now, 48):
        at = slice(t, t + 1)
        found = sc.attend(q[:, :, at], k[:, :, at], v[:, :, at], text, state=state, need=("out", "state"))
        torch.testing.assert_close(found.out, whole[:, :, at], atol=1e-10, rtol=0)
        state = found.state


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(32, 4, "gqa(2) + s2_attention(4, local=1, stripes=3, share=2)").double()
    x = torch.randn(2, 43, 32, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_work_follows_the_blocks() -> None:
    shape = (1, 8, 4096, 32)
    sparse, full = (sc.plan(m, shape, kernel="chunk").cost.flops for m in ("s2_attention", "causal"))
    kept = int(mask(1024, 1, 16, 4, 8).sum()) / (1024 * 1025 / 2)
    assert sparse < 1.3 * kept * full


def recalled(mechanism: str) -> float:
    """Accuracy of a one-layer model that finds one needle in 64 tokens."""
    torch.manual_seed(0)
    task = Needle(length=64, needles=1, keys=4, values=4)
    generator = torch.Generator().manual_seed(0)
    model = sc.nn.Transformer(task.vocab, dim=32, depth=1, heads=2, mechanism=mechanism, max_length=64)
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, 450, rate=5e-3)
    tokens, targets = task.batch(256, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_shared_stripes_find_the_needle_and_equal_ones_miss_half() -> None:
    assert recalled("s2_attention(4, local=1, stripes=2)") >= 0.95
    assert recalled("s2_attention(4, local=1, stripes=2, step=0)") <= 0.8
