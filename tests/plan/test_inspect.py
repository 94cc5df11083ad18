"""Looking beside the fast kernel: weights, mass and choices are those of the definition."""

from __future__ import annotations

import pytest
import torch

import saccade as sc
from kernels.harness import Call, draw, same, truth
from saccade.parts.selection import Blocks, Buckets, Spans

TEXTS = [
    "full",
    "causal + alibi",
    "rope + window(5) + sink(2)",
    "causal + additive(4)",
    "moba(block=8, top=2)",
    "causal + gauss_gate(3)",
    "luong_attention(local=predictive, half=4)",
    "causal + linear",
    "linear",
    "causal + performer_favor(12)",
    "causal + fixed_decay + identity",
    "efficient_attention",
    "mix(causal, causal + linear, shares=(0.3, 0.7))",
    "by_head(window(4), causal + linear)",
    "memory_efficient_attention",
]
NOT_NORMALISED = {
    "causal + gauss_gate(3)",
    "luong_attention(local=predictive, half=4)",
    "causal + fixed_decay + identity",
}


def look(call: Call, need: tuple[str | sc.Weights, ...]) -> sc.Attended:
    return sc.attend(
        call.q,
        call.k,
        call.v,
        call.text,
        mask=call.mask,
        key_lengths=call.lengths,
        params=call.params,
        streams=call.streams,
        buffers=call.buffers,
        need=need,
    )


@pytest.mark.parametrize("rows", [37, 300])
@pytest.mark.parametrize("text", TEXTS)
def test_weights_times_values_are_the_output(text: str, rows: int) -> None:
    call = draw(text, rows=rows, heads=4, batch=1, kv=2 if "by_head" in text else 4)
    found = look(call, ("out", "weights", "mass"))
    assert found.weights is not None
    assert found.mass is not None
    v = call.v.repeat_interleave(4 // call.v.shape[1], dim=1)
    same("out", found.weights @ v, truth(call)[0])
    same("mass", found.mass, found.weights.sum(2))
    if text not in NOT_NORMALISED:
        same("sum of weights", found.mass.sum(-1), torch.full((1, 4), float(rows), dtype=torch.float64))


@pytest.mark.parametrize("text", TEXTS)
def test_named_heads_and_rows_are_a_cut_of_all(text: str) -> None:
    call = draw(text)
    every = look(call, ("weights",)).weights
    assert every is not None
    heads, rows = (3, 0), (36, 2, 2, -1)
    some = look(call, (sc.Weights(heads, rows),)).weights
    assert some is not None
    same("weights", some, every[:, list(heads)][:, :, list(rows)])
    same("weights", look(call, (sc.Weights(rows=(5,)),)).weights, every[:, :, 5:6])
    same("weights", look(call, (sc.Weights(heads=(1,)),)).weights, every[:, 1:2])


def test_rows_far_apart_in_a_long_call() -> None:
    call = draw("causal", rows=900, heads=2, batch=1, dim=4)
    every = look(call, ("weights",)).weights
    rows = (0, 899, 450, 3)
    same("weights", look(call, (sc.Weights(rows=rows),)).weights, every[:, :, list(rows)])


@pytest.mark.parametrize(
    "text", ["causal", "causal + linear", "moba(block=8, top=2)", "causal + performer_favor(12)"]
)
def test_ragged_padding_has_neither_weight_nor_mass(text: str) -> None:
    call = draw(text, batch=2, lengths=[37, 20]).poisoned()
    found = look(call, ("weights", "mass"))
    assert found.weights is not None
    assert found.mass is not None
    assert not found.weights[1, :, :20, 20:].any()
    clean = draw(text, batch=2, lengths=[37, 20])
    alone = Call(text, clean.q[1:, :, :20], clean.k[1:, :, :20], clean.v[1:, :, :20], buffers=clean.buffers)
    short = look(alone, ("weights", "mass"))
    same("weights", found.weights[1:, :, :20, :20], short.weights)
    same("mass", found.mass[1:, :, :20], short.mass)
    assert not found.mass[1, :, 20:].any()
    same("sum of mass", found.mass.sum(-1)[:, 0], torch.tensor([37.0, 20.0], dtype=torch.float64))


def test_masked_rows_have_no_weight() -> None:
    call = draw("causal")
    mask = torch.rand(2, 4, 37, 37) < 0.5
    mask[:, :, 7] = False
    found = sc.attend(call.q, call.k, call.v, "causal", mask=mask, need=("weights", "mass"))
    below = torch.ones(37, 37, dtype=torch.bool).tril()
    assert not found.weights[~(mask & below)].any()
    rows = (mask & below).any(-1).sum(-1).double()
    same("sum of mass", found.mass.sum(-1), rows)


def test_weights_of_a_prefix_scan() -> None:
    call = draw("aaren", rows=20)
    found = look(call, ("weights", "mass"))
    same("out", found.weights @ call.v, truth(call)[0])
    same("sum of mass", found.mass.sum(-1), torch.full((2, 4), 20.0, dtype=torch.float64))


def test_more_weights_than_the_budget_are_refused_with_the_call_to_make() -> None:
    q = torch.ones(1, 1, 1, 4).expand(1, 2, 8192, 4)
    words = (
        r"134,217,728 weights were asked for, more than 67,108,864; name fewer with saccade.Weights\(heads"
    )
    with pytest.raises(sc.NotSupported, match=words):
        sc.attend(q, q, q, "window(4)", need=("weights",))
    few = sc.attend(q[:, :, :64], q[:, :, :64], q[:, :, :64], "causal", need=(sc.Weights((0,), (5, 6)),))
    assert few.weights.shape == (1, 1, 2, 64)


def test_heads_and_rows_that_do_not_exist() -> None:
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="head 2 does not exist; there are 2"):
        sc.attend(q, q, q, "causal", need=(sc.Weights(heads=(2,)),))
    with pytest.raises(ValueError, match="row -9 does not exist; there are 8"):
        sc.attend(q, q, q, "causal", need=(sc.Weights(rows=(-9,)),))


def test_what_has_no_weights_says_so() -> None:
    for text, words in (
        ("nystromformer(taps=0)", "no weight for a single pair"),
        ("linformer(rank=4, length=64)", "weighs 4 summaries, not the 37 keys"),
        ("causal + centroid_buckets(3)", "averages over the buckets that took a token; ask for `selection`"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            look(draw(text), ("weights",))


def test_selections() -> None:
    kinds = {
        "moba(block=8, top=2)": Blocks,
        "causal + centroid_buckets(3)": Buckets,
        "luong_attention(local=predictive)": Spans,
        "causal": type(None),
        "causal + linear": type(None),
    }
    for text, kind in kinds.items():
        assert isinstance(look(draw(text), ("selection",)).selection, kind)


def test_a_window_reads_only_its_keys() -> None:
    w = look(draw("window(4)", heads=1, batch=1), ("weights",)).weights
    i, j = torch.arange(37)[:, None], torch.arange(37)
    assert torch.equal(w[0, 0] > 0, (j <= i) & (j > i - 4))
