"""The bucket kernel against the definition: softmax inside buckets of tokens chosen by content."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import agree, answer, draw, gradients, same, truth, within_budget
from saccade.parts.selection import Buckets

TEXTS = [
    "routing_transformer(clusters=3, local=false)",
    "routing_transformer(clusters=4, width=20, local=false)",
    "routing_transformer(clusters=1, width=37, local=false)",
    "centroid_buckets(3)",
    "standardize + centroid_buckets(5, width=3)",
    "bilinear + causal + centroid_buckets(3)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text), "bucket", lse=False)


@pytest.mark.parametrize("rows", [1, 2, 16, 50])
def test_lengths(rows: int) -> None:
    agree(draw("routing_transformer(clusters=3, local=false)", rows=rows), "bucket", lse=False)


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("text", ["centroid_buckets(3)", "standardize + causal + centroid_buckets(3)"])
def test_grouped_heads_and_another_value_size(text: str, kv: int) -> None:
    agree(draw(text, kv=kv, value=5), "bucket", lse=False)


@pytest.mark.parametrize(
    "text",
    [
        "centroid_buckets(3)",
        "standardize + causal + centroid_buckets(3)",
        "causal + centroid_buckets(4, width=15)",
    ],
)
def test_ragged_padding_never_reaches_a_result(text: str) -> None:
    agree(draw(text, batch=3, lengths=[37, 20, 0], kv=2), "bucket", lse=False)


def test_queries_and_keys_differ_in_number() -> None:
    for rows, keys in ((5, 37), (37, 5)):
        agree(draw("centroid_buckets(3)", rows=rows, keys=keys), "bucket", lse=False)


def test_strides_of_the_inputs_do_not_matter() -> None:
    call = draw("standardize + causal + centroid_buckets(3)")
    agree(call.changed(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), "bucket", lse=False)
    wide = replace(call, v=call.v[:1].expand_as(call.v))
    same("out", answer(wide, "bucket", False)[0], truth(wide)[0])


def test_a_token_that_no_bucket_took_gives_zeros_and_finite_gradients() -> None:
    call = draw("centroid_buckets(2, width=3)")
    chosen = sc.attend(call.q, call.k, call.v, call.text, buffers=call.buffers, need=("selection",)).selection
    assert isinstance(chosen, Buckets)
    out, _ = answer(call, "bucket", False)
    for b in range(2):
        for h in range(4):
            taken = set(chosen.q[b, h].flatten().tolist())
            for i in range(37):
                assert bool(out[b, h, i].any()) == (i in taken)
    found = gradients(call, lambda c: answer(c, "bucket", False))
    assert all(torch.isfinite(x).all() for x in found.values())


def test_one_bucket_of_all_tokens_is_causal_attention() -> None:
    call = draw("causal + centroid_buckets(1, width=37)")
    same("out", answer(call, "bucket", False)[0], truth(replace(call, text="causal"))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_within_the_twins_budget(dtype: torch.dtype) -> None:
    """One bucket holds all tokens, so that no choice can differ between precisions."""
    call = draw("causal + centroid_buckets(1, width=100)", rows=100, dim=16, dtype=dtype)

    def twin(c) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        below = torch.ones(100, 100, dtype=torch.bool).tril()
        s = ((c.q @ c.k.transpose(-1, -2)) * 0.25).masked_fill(~below, -torch.inf)
        return torch.softmax(s, -1) @ c.v, None

    within_budget(call, "bucket", twin)


def test_what_it_refuses_it_explains() -> None:
    text = "causal + centroid_buckets(3)"
    for more, words in (
        ({"masked": True}, "a mask of single pairs"),
        ({"lse": True}, "no single lse"),
        ({"decoding": True}, "nearest centroid"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            sc.plan(text, (1, 4, 64, 16), kernel="bucket", **more)
    with pytest.raises(sc.NotSupported, match="not buckets alone"):
        sc.plan("moba", (1, 4, 64, 16), kernel="bucket")
    for other, words in (
        (text + " + window(3)", r"unites with nothing: got pairs .*use mix"),
        (text + " + alibi", "knows no logits, such as alibi"),
        (text + " + gauss_gate", "knows no reweight, such as gauss_gate"),
        (text + " + entmax", "knows no normalizer, such as entmax"),
    ):
        with pytest.raises(sc.MechanismError, match=words):
            sc.mechanism(other)
