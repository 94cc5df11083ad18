"""Planned FLOPs against what PyTorch's counter sees while the kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import saccade as sc
from kernels.harness import Call, draw
from saccade import native
from saccade.cost import Cost, Shape

DIM = 32

COUNTED: list[tuple[str, str, int, dict[str, Any]]] = [
    ("window(64)", "chunk", 1024, {}),
    ("window(256)", "chunk", 1000, {"kv": 2}),
    ("neighborhood(65)", "chunk", 1000, {"value": 16}),
    ("neighborhood(33, dilation=3)", "chunk", 1000, {}),
    ("dilated(32, step=4)", "chunk", 1024, {}),
    ("dilated(32, step=3)", "chunk", 1000, {}),
    ("strided(8)", "chunk", 1000, {}),
    ("window(64) + sink(4)", "chunk", 1000, {}),
    ("causal + chunk(64)", "chunk", 1000, {}),
    ("chunk(64)", "chunk", 1000, {}),
    ("bilinear + window(64)", "chunk", 1000, {}),
    ("causal", "chunk", 1000, {}),
    ("alibi + causal", "chunk", 1000, {}),
    ("causal + tiles(128, 256)", "chunk", 1000, {}),
    ("memory_efficient_attention", "chunk", 1000, {}),
    ("linformer(rank=32, length=1024)", "chunk", 1000, {}),
    ("full", "native", 1000, {"value": 16}),
    ("causal", "native", 1000, {"kv": 2}),
    ("causal", "native", 20, {"kv": 1}),
    ("window(64) + sink(4)", "native", 1000, {}),
    ("dilated(32, step=3)", "native", 1000, {}),
    ("window(64) + strided(7)", "native", 1000, {}),
    ("permuted(65, length=400)", "native", 1000, {}),
    ("bilinear + window(64)", "native", 1000, {}),
    ("causal", "slab", 1000, {}),
    ("full", "slab", 300, {"value": 16}),
    ("causal + additive(8)", "slab", 1024, {}),
    ("causal + additive(8)", "slab", 200, {"kv": 2}),
    ("luong_attention(local=predictive)", "slab", 500, {}),
    ("linformer(rank=32, length=1024)", "slab", 1000, {}),
    ("window(7) + sink_logit + length_scale", "slab", 1000, {"kv": 2}),
    ("causal + relu", "slab", 500, {}),
    ("full", "sdpa", 500, {"value": 16}),
    ("causal + linear", "recurrent", 1024, {}),
    ("causal + linear", "recurrent", 1000, {"kv": 2, "value": 48}),
    ("causal + identity", "recurrent", 1000, {}),
    ("causal + linear", "native_linear", 1000, {"kv": 2, "value": 48}),
    ("causal + fixed_decay + elu1 + ratio", "native_linear", 1000, {}),
    ("causal + fixed_decay + elu1 + ratio", "recurrent", 1000, {}),
    ("causal + performer_favor(64)", "recurrent", 1000, {}),
    ("linear", "recurrent", 1000, {"kv": 2}),
    ("performer_favor(64)", "recurrent", 1000, {}),
    ("efficient_attention", "recurrent", 1000, {"value": 16}),
    ("nystromformer(taps=0)", "mixer", 1000, {"kv": 2}),
    ("aaren", "scan", 1000, {"kv": 2}),
    ("causal + centroid_buckets(8)", "bucket", 1000, {}),
]

BY_CONTENT = [
    ("moba(block=64, top=4)", 1024),
    ("moba(block=64, top=4)", 2000),
    ("moba(block=32, top=2)", 1000),
    ("top_blocks(64, top=4)", 1024),
]


def planned_and_counted(text: str, kernel: str, grad: bool, call: Call) -> tuple[int, int]:
    q, k, v = call.q, call.k, call.v
    shape = Shape(*q.shape, k.shape[1], k.shape[2], v.shape[-1])
    planned = sc.plan(text, shape, grad=grad, kernel=kernel).cost.flops
    learned = [x.requires_grad_(grad) for x in call.learned.values()]
    given = {"params": call.params, "streams": call.streams, "buffers": call.buffers}
    with FlopCounterMode(display=False) as counter, native.counting() as engine:
        out = sc.attend(q, k, v, text, kernel=kernel, **given)
        if grad:
            torch.autograd.grad(out.sum(), learned, allow_unused=True)
    return planned, counter.get_total_flops() + engine.flops


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with gradients"])
@pytest.mark.parametrize(("text", "kernel", "rows", "options"), COUNTED)
def test_planned_is_counted_within_one_percent(
    text: str, kernel: str, rows: int, options: dict[str, Any], grad: bool
) -> None:
    if kernel.startswith("native") and not native.available():
        pytest.skip(f"the native engine {native.reason()}")
    call = draw(text, batch=1, rows=rows, dim=DIM, dtype=torch.float32, **options)
    planned, counted = planned_and_counted(text, kernel, grad, call)
    assert counted
    assert planned == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with gradients"])
@pytest.mark.parametrize(("text", "rows"), BY_CONTENT)
@pytest.mark.parametrize("kernel", ["block", "native"])
def test_work_that_depends_on_the_data_is_planned_within_fifteen_percent(
    kernel: str, text: str, rows: int, grad: bool
) -> None:
    """The tiles of chosen blocks fill up as the queries choose; random choices are the rule of thumb."""
    if kernel == "native" and not native.available():
        pytest.skip(f"the native engine {native.reason()}")
    call = draw(text, batch=1, rows=rows, dim=DIM, dtype=torch.float32)
    planned, counted = planned_and_counted(text, kernel, grad, call)
    assert planned == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(
    ("text", "rows", "options"),
    [
        ("causal", 2, {"kv": 1}),
        ("window(100)", 1, {"kv": 1, "value": 16}),
        ("causal + alibi", 1, {}),
        ("window(100) + sink(4)", 3, {}),
        ("bilinear", 1, {"value": 16}),
        ("linformer(rank=32, length=2048)", 2, {}),
    ],
)
def test_decoding_is_planned_as_counted(text: str, rows: int, options: dict[str, Any]) -> None:
    call = draw(text, batch=1, rows=rows, keys=2000, dim=DIM, dtype=torch.float32, **options)
    planned, counted = planned_and_counted(text, "decode", False, call)
    assert planned == pytest.approx(counted, rel=0.01)


def test_fused_attention_is_planned_by_the_pairs_that_exist() -> None:
    """The counter does not know the fused CPU operator, and counts a fused causal one whole: so this one is by hand."""
    shape = sc.Shape(2, 4, 300, DIM, value_dim=DIM)
    pairs = {"full": 2 * 4 * 300 * 300, "causal": 2 * 4 * sum(i + 1 for i in range(300))}
    for text, count in pairs.items():
        assert sc.plan(text, shape, kernel="sdpa").cost.flops == count * 2 * (DIM + DIM)
        assert sc.plan(text, shape, kernel="sdpa", grad=True).cost.flops == count * 2 * (4 * DIM + 3 * DIM)
    q = torch.randn(2, 4, 300, DIM)
    with FlopCounterMode(display=False) as counter:
        sc.attend(q, q, q, "full", kernel="sdpa")
    assert counter.get_total_flops() == 0


def test_a_grouped_convolution_is_counted_forward() -> None:
    """Of the weight gradient of a grouped convolution the counter sees the ungrouped one, so this one is forward alone."""
    call = draw("nystromformer", batch=1, rows=1000, dim=DIM, dtype=torch.float32)
    planned, counted = planned_and_counted("nystromformer", "mixer", False, call)
    assert planned == pytest.approx(counted, rel=0.01)


def test_a_combination_costs_what_its_members_cost() -> None:
    shape = (1, 4, 512, DIM)
    mixed = sc.plan("mix(window(64), causal + linear)", shape)
    members = [sc.plan(t, shape, lse=False).cost for t in ("window(64)", "causal + linear")]
    assert mixed.cost.flops == sum(c.flops for c in members)
    assert mixed.cost.bytes == sum(c.bytes for c in members)
    halves = sc.plan("by_head(window(64), causal + linear)", shape)
    assert halves.cost.flops * 2 == mixed.cost.flops


@pytest.mark.parametrize(
    ("text", "exponent"),
    [
        ("causal", 2.0),
        ("window(64)", 1.0),
        ("causal + linear", 1.0),
        ("neighborhood(65)", 1.0),
        ("strided(2)", 2.0),
        ("causal + chunk(64)", 1.0),
    ],
)
def test_planned_work_grows_with_the_exponent_of_the_mechanism(text: str, exponent: float) -> None:
    low, high = (sc.plan(text, (1, 4, n, 64)).cost.flops for n in (4096, 16384))
    assert torch.tensor(high / low).log2().item() / 2 == pytest.approx(exponent, abs=0.1)


def test_costs_add_in_a_row() -> None:
    assert Cost(1, 2, 30, 1) + Cost(10, 20, 5, 2) == Cost(11, 22, 30, 3)


def test_shapes() -> None:
    s = Shape.of((1, 8, 128, 64))
    assert (s.kv_heads, s.keys, s.value_dim) == (8, 128, 64)
    assert Shape.of(s) is s
    assert str(Shape(1, 8, 1, 64, 2, 128, 32)) == "q (1, 8, 1, 64), k (1, 2, 128, 64), v (..., 32)"
    with pytest.raises(
        ValueError,
        match=r"a shape is saccade.Shape\(...\) or \(batch, heads, length, head_dim\), got \(1, 2, 3\)",
    ):
        Shape.of((1, 2, 3))
