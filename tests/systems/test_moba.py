"""S211, MoBA: every query reads its own block and the past blocks whose mean key it scores highest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.tasks.needle import Needle
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import below, dense, flops, qkv, stepwise, train

pytestmark = pytest.mark.system("S211")


@pytest.mark.parametrize("length", [1, 7, 64, 77])
@pytest.mark.parametrize("top", [15, 40])
def test_all_blocks_are_full_causal_attention(length: int, top: int) -> None:
    q, k, v = qkv(2, 4, length, 8, kv=2)
    found = sc.attend(q, k, v, f"moba(5, top={top})")
    torch.testing.assert_close(found, dense(q, k, v, below(length)), atol=1e-12, rtol=0)


def written_out(q: Tensor, k: Tensor, v: Tensor, block: int, top: int) -> tuple[Tensor, Tensor]:
    """MoBA row by row: the output, and which blocks each query reads, (b, h, L, blocks)."""
    b, h, length, _ = q.shape
    blocks = -(-length // block)
    out, read = torch.zeros_like(q), torch.zeros(b, h, length, blocks, dtype=torch.bool)
    for n in range(b):
        for head in range(h):
            g = head * k.shape[1] // h
            means = [k[n, g, at * block : (at + 1) * block].mean(0) for at in range(blocks)]
            for i in range(length):
                own = i // block
                gate = {at: float(q[n, head, i] @ means[at]) for at in range(own)}
                chosen = [*sorted(gate, key=gate.__getitem__, reverse=True)[:top], own]
                keys = [j for at in sorted(chosen) for j in range(at * block, min((at + 1) * block, i + 1))]
                w = torch.softmax(k[n, g, keys] @ q[n, head, i] / q.shape[-1] ** 0.5, 0)
                out[n, head, i] = w @ v[n, g, keys]
                read[n, head, i, chosen] = True
    return out, read


@pytest.mark.parametrize("kernel", ["block", "gather", "slab", None])
@pytest.mark.parametrize("length", [32, 45])
def test_every_path_equals_the_formula(kernel: str | None, length: int) -> None:
    q, k, v = qkv(2, 4, length, 8, kv=2)
    expected, _ = written_out(q, k, v, 5, 2)
    text = "moba(5, top=2)"
    torch.testing.assert_close(sc.attend(q, k, v, text, kernel=kernel), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(sc.reference.attend(q, k, v, text), expected, atol=1e-10, rtol=0)


def test_the_gathered_path_equals_the_token_mask_and_its_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 200, 16, kv=2, dtype=torch.float32))
    found = {n: sc.attend(q, k, v, "moba(16, top=3)", kernel=n) for n in ("block", "gather", "slab")}
    truth = sc.reference.attend(q, k, v, "moba(16, top=3)")
    for x in found.values():
        torch.testing.assert_close(x, truth, atol=1e-5, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in found.values()]
    for *gathered, masked in zip(*grads, strict=True):
        for x in gathered:
            torch.testing.assert_close(x, masked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [16, 45, 128])
@pytest.mark.parametrize("top", [1, 3])
def test_no_future_block_is_ever_selected(length: int, top: int) -> None:
    q, k, v = qkv(3, 4, length, 8, kv=2)
    chosen = sc.attend(q, k, v, f"moba(8, top={top})", need=("out", "selection")).selection
    own = torch.arange(length)[:, None] // 8
    assert (chosen.index < own)[chosen.valid].all()
    assert torch.equal(chosen.valid.sum(-1), own.squeeze(-1).clamp_max(top).expand(3, 4, -1))
    _, read = written_out(q, k, v, 8, top)
    found = F.one_hot(chosen.index, read.shape[-1]).bool() & chosen.valid.unsqueeze(-1)
    assert torch.equal(found.any(-2).scatter(-1, own.expand(3, 4, -1, -1), True), read)


def test_later_tokens_do_not_move_earlier_outputs() -> None:
    q, k, v = qkv(2, 2, 64, 8)
    first = sc.attend(q, k, v, "moba(8, top=2)")
    later = (torch.arange(64) >= 37)[:, None]
    moved = [torch.where(later, torch.randn_like(x), x) for x in (q, k, v)]
    torch.testing.assert_close(
        sc.attend(*moved, "moba(8, top=2)")[:, :, :37], first[:, :, :37], atol=1e-12, rtol=0
    )


def test_no_gradient_flows_through_the_gate() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 24, 4))
    choice = sc.attend(q, k, v, "moba(4, top=2)", need=("out", "selection")).selection
    free = torch.autograd.grad(sc.attend(q, k, v, "moba(4, top=2)").sin().sum(), (q, k, v))
    frozen = sc.attend(q, k, v, "moba(4, top=2)", selection=choice)
    for a, b in zip(free, torch.autograd.grad(frozen.sin().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(32, 4, "moba(5, top=2)").double()
    x = torch.randn(2, 43, 32, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_a_layer_switches_between_full_and_sparse_without_new_parameters() -> None:
    full, sparse = sc.nn.Attention(32, 4, "causal"), sc.nn.Attention(32, 4, "moba(8, top=1)")
    sparse.load_state_dict(full.state_dict())
    x = torch.randn(2, 64, 32)
    torch.testing.assert_close(sparse(x)[:, :16], full(x)[:, :16], atol=1e-5, rtol=0)
    assert (sparse(x) - full(x))[:, 16:].abs().max() > 1e-3


def test_work_follows_the_choice_and_not_all_pairs() -> None:
    q, k, v = qkv(1, 2, 4096, 32, dtype=torch.float32)
    sparse, full = (sc.plan(m, (1, 2, 4096, 32)).cost.flops for m in ("moba(128, top=2)", "causal"))
    assert sparse < full / 3
    counted = flops(lambda: sc.attend(q, k, v, "moba(128, top=2)", kernel="block"))
    assert counted < 4096 * 4096 * 32 * 2 * 2 * 2 / 4


def recalled(mechanism: str, steps: int) -> float:
    """Accuracy of a one-layer model that finds one needle in 64 tokens."""
    torch.manual_seed(0)
    task, generator = Needle(length=64, needles=1, keys=4, values=4), torch.Generator().manual_seed(0)
    model = sc.nn.Transformer(task.vocab, dim=32, depth=1, heads=2, mechanism=mechanism, max_length=64)
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    tokens, targets = task.batch(256, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_three_of_sixteen_blocks_find_the_needle_and_a_window_of_that_size_does_not() -> None:
    full, blocks, window = (
        recalled("causal", 400),
        recalled("moba(4, top=2)", 700),
        recalled("window(12)", 400),
    )
    assert full > 0.97
    assert blocks >= full - 0.03
    assert window <= full - 0.3
