"""The scan kernel against the definition: one learned query, one answer for every prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import agree, answer, draw, same, truth, within_budget
from saccade.kernels.scan import prefixes


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 200])
def test_equals_the_definition(rows: int) -> None:
    agree(draw("aaren", rows=rows, heads=2), "scan")


@pytest.mark.parametrize("kv", [1, 2])
def test_grouped_heads_and_another_value_size(kv: int) -> None:
    agree(draw("aaren", kv=kv, value=5, rows=70), "scan")


def test_another_score() -> None:
    agree(draw("learned_query + causal + dot(scale=1.5)", rows=70), "scan")


def test_ragged_padding_never_reaches_a_result() -> None:
    agree(draw("aaren", batch=3, rows=70, lengths=[70, 20, 0], kv=2), "scan")


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_any_bracketing_of_the_merge_gives_the_same_prefixes(chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    s = 20 * torch.randn(1, 2, 50, generator=g, dtype=torch.float64)
    v = torch.randn(1, 2, 50, 3, generator=g, dtype=torch.float64)
    out, lse = prefixes(s, v, chunk=chunk)
    for i in range(50):
        same(
            "out",
            out[:, :, i],
            (torch.softmax(s[..., : i + 1], -1).unsqueeze(-2) @ v[:, :, : i + 1]).squeeze(-2),
        )
        same("lse", lse[:, :, i], torch.logsumexp(s[..., : i + 1], -1))


def test_strides_of_the_inputs_do_not_matter() -> None:
    call = draw("aaren", rows=70)
    agree(call.changed(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)), "scan")
    wide = replace(call, k=call.k[:, :1].expand_as(call.k), v=call.v[:1].expand_as(call.v))
    same("out", answer(wide, "scan", True)[0], truth(wide)[0])


def test_logits_of_ten_thousand_do_not_overflow() -> None:
    call = draw("aaren", rows=70)
    agree(replace(call, q=call.q * 1e4), "scan", grad=False)


def naive(call) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
    n = call.k.shape[2]
    s = (call.q @ call.k.transpose(-1, -2)) * call.q.shape[-1] ** -0.5
    below = torch.ones(n, n, dtype=torch.bool).tril()
    return torch.softmax(s.expand(-1, -1, n, -1).masked_fill(~below, -torch.inf), -1) @ call.v, None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_within_the_twins_budget(dtype: torch.dtype) -> None:
    within_budget(draw("aaren", rows=150, dim=16, dtype=dtype), "scan", naive)


def test_what_it_refuses_it_explains() -> None:
    for text, words in (
        ("causal", "not constant over rows"),
        ("alibi + aaren", "softmax over a factored score"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            sc.plan(text, (1, 4, 64, 16), kernel="scan")
    with pytest.raises(sc.NotSupported, match="no prefix form; use key_lengths"):
        sc.plan("aaren", (1, 4, 64, 16), kernel="scan", masked=True)
