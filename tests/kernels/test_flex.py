"""The flex kernel: refused on a CPU with its reasons; on CUDA it answers what the definition answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import saccade as sc
from kernels.harness import draw, truth

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention is compiled for CUDA here"
)


def test_on_a_cpu_it_says_why_not() -> None:
    with pytest.raises(sc.NotSupported, match=r"waits tens of seconds for a compiler"):
        sc.plan("window(64)", (1, 4, 512, 64), kernel="flex")
    rejected = {
        c.kernel.name: c.reasons for c in sc.plan("window(64)", (1, 4, 512, 64)).candidates if c.reasons
    }
    assert any("no backward" in why for why in rejected["flex"])


@needs_cuda
@pytest.mark.parametrize("text", ["alibi + causal", "alibi + window(64)"])
@pytest.mark.parametrize("kv", [2, 4])
def test_equals_the_definition_on_cuda(text: str, kv: int) -> None:
    call = draw(text, rows=400, dim=64, kv=kv, dtype=torch.float32)
    there = replace(call.changed(lambda x: x.cuda().bfloat16()))
    out = sc.attend(there.q, there.k, there.v, text, kernel="flex")
    want, _ = truth(there.changed(lambda x: x.cpu().double()))
    chunk = sc.attend(there.q, there.k, there.v, text, kernel="chunk")
    budget = 2 * (chunk.cpu().double() - want).abs().max() + 2**-8 * want.abs().max()
    assert (out.cpu().double() - want).abs().max() <= budget
