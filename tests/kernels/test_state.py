"""The Triton kernels of recurrent mechanisms: in Triton's interpreter in a process of its own, and on a GPU at real sizes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saccade as sc
from saccade.mechanism import draw_named
from saccade.parts.base import Sizes

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TEXTS = ("causal + linear", "retention", "gla", "causal + gate_decay + identity")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU that is here")
def test_every_option_in_the_interpreter() -> None:
    """Triton reads its variable when it is imported, so this needs a process of its own."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
    found = subprocess.run(
        [*command, str(here / "interpreted_state.py")],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(here.parent), *sys.path))),
        },
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


def test_on_a_cpu_it_says_why_not() -> None:
    with pytest.raises(sc.NotSupported, match=r"not installed|only in Triton's interpreter"):
        sc.plan("causal + linear", (1, 4, 512, 64), kernel="state")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("linear", "without an order"),
        ("causal + performer_favor(12)", "a scale of its own"),
        ("causal + channel_decay + unit + delta", "not one a channel"),
        ("causal", "this one is pairwise"),
    ],
)
def test_it_says_what_it_does_not_run(text: str, reason: str) -> None:
    plan = sc.plan(text, (1, 4, 512, 64))
    assert any(reason in why for x in plan.candidates if x.kernel.name == "state" for why in x.reasons)


def test_large_states_are_left_to_recurrent() -> None:
    plan = sc.plan("causal + identity", (1, 4, 512, 256))
    assert plan.kernel != "state"
    assert any("at most 128 channels, here 256" in why for x in plan.candidates for why in x.reasons)


def test_half_precision_does_not_overwrite_on_a_gpu() -> None:
    plan = sc.plan("delta_net", (1, 16, 8192, 128), device="cuda", dtype=torch.bfloat16)
    assert plan.kernel == "recurrent"
    assert any("solved in float32" in why for x in plan.candidates for why in x.reasons)


@needs_cuda
def test_the_plan_prefers_it() -> None:
    for text in TEXTS:
        for grad in (False, True):
            plan = sc.plan(text, (1, 16, 8192, 128), device="cuda", dtype=torch.bfloat16, grad=grad)
            assert plan.kernel == "state"


@needs_cuda
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_agrees_with_float64_on_cuda(text: str, dim: int) -> None:
    m, g = sc.mechanism(text), torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 4, 777, dim, generator=g).to("cuda", torch.bfloat16).requires_grad_() for _ in range(3)
    )
    named = draw_named(m, Sizes(4, 4, dim, dim), 2, 777, g, device="cuda")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    found = []
    for tensors, kernel in (((q, k, v), "state"), (wide, "recurrent")):
        own = {kind: {n: x.to(tensors[0].dtype) for n, x in each.items()} for kind, each in named.items()}
        out = sc.attend(*tensors, m, kernel=kernel, **own)
        w = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        found.append([out, *torch.autograd.grad((out * w.to(out.dtype)).sum(), tensors)])
    for low, high in zip(*found, strict=True):
        assert float((low - high).norm() / high.norm()) < 0.02
