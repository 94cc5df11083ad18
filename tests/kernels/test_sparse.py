"""The sparse kernel: in Triton's interpreter in a process of its own, and on a GPU at real sizes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saccade as sc
from saccade.kernels import sparse_run

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU that is here")
def test_every_option_in_the_interpreter() -> None:
    """Triton reads its variable when it is imported, so this needs a process of its own."""
    here = Path(__file__).parent
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-n",
            "0",
            str(here / "interpreted_sparse.py"),
        ],
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
        sc.plan("window(64)", (1, 4, 512, 64), kernel="sparse")


@needs_cuda
def test_the_plan_prefers_it_and_leaves_dense_attention_to_sdpa() -> None:
    for text in ("window(1024)", "causal + sink(4) + window(512)", "moba(block=512, top=8)"):
        assert (
            sc.plan(text, (1, 16, 8192, 128), device="cuda", dtype=torch.bfloat16, grad=True).kernel
            == "sparse"
        )
    assert sc.plan("causal", (1, 16, 8192, 128), device="cuda", dtype=torch.bfloat16).kernel == "sdpa (cudnn)"


@needs_cuda
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(
    ("text", "rows", "lengths"),
    [
        ("causal + sink(3) + window(70)", 301, None),
        ("window(90)", 300, [300, 150]),
        ("moba(block=64, top=2)", 333, None),
        ("causal + top_blocks(50, top=2) + window(11)", 200, None),
        ("causal", 1000, None),
    ],
)
def test_agrees_with_float64_on_cuda(text: str, rows: int, lengths: list[int] | None, dim: int) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 4, rows, dim), (2, 2, rows, dim), (2, 2, rows, dim))
    q, k, v = (torch.randn(s, device="cuda", generator=g).bfloat16() for s in shapes)
    ends = None if lengths is None else torch.tensor(lengths, device="cuda")
    kept = (
        torch.ones(2, 1, rows, 1, device="cuda")
        if ends is None
        else (torch.arange(rows, device="cuda") < ends[:, None])[:, None, :, None]
    )
    weight = torch.randn(2, 4, rows, dim, device="cuda", generator=g) * kept
    chosen = sc.attend(q, k, v, text, need=("out", "selection")).selection if "block" in text else None
    answers = []
    for kernel, dtype in (
        ("sparse", torch.bfloat16),
        ("block" if chosen is not None else "chunk", torch.float64),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = sc.attend(*leaves, text, key_lengths=ends, kernel=kernel, selection=chosen)
        answers.append([out * kept, *torch.autograd.grad((out.double() * weight).sum(), leaves)])
    for a, b in zip(*answers, strict=True):
        assert (a.double() - b.double()).norm() <= 0.01 * b.double().norm()


@needs_cuda
def test_other_lengths_and_masks_compile_nothing() -> None:
    from saccade.kernels import sparse_triton

    def compiled() -> int:
        return sum(len(caches[0]) for caches in sparse_triton.forward.device_caches.values())

    def run(length: int, text: str) -> None:
        q = torch.randn(1, 2, length, 64, device="cuda", dtype=torch.bfloat16)
        sc.attend(q, q, q, text, kernel="sparse")

    run(1000, "window(100)"), run(1000, "causal"), run(1000, "sink(4) + window(100)")
    before = compiled()
    for length in (16, 257, 1024, 2000, 4096):
        for text in ("window(33)", "causal", "sink(16) + window(64)", "causal + document((100, 200))"):
            run(length, text)
    assert compiled() == before


def test_it_is_lazy() -> None:
    """Importing the library imports no Triton."""
    code = "import sys, saccade; saccade.plan('window(8)', (1, 2, 64, 16)); sys.exit('triton' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ).returncode
        == 0
    )


def test_launches_fit_a_table() -> None:
    assert sparse_run.padded(1) == 16
    assert sparse_run.padded(80) == 128
