"""The mixer kernel against the definition: mixers compute themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import Call, agree, answer, draw, same, truth, within_budget
from saccade.systems.nystromformer import iterative_inverse, segment_means

TEXTS = [
    "nystromformer(landmarks=4)",
    "nystromformer(landmarks=5, taps=0)",
    "nystromformer(landmarks=3, taps=4)",
    "nystromformer(landmarks=100, iterations=2)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str) -> None:
    agree(draw(text, rows=13, heads=2, batch=1), "mixer", lse=False)


def test_grouped_heads_and_another_value_size() -> None:
    agree(draw("nystromformer(landmarks=4)", rows=13, kv=2, value=5, batch=1), "mixer", lse=False)


def test_ragged_padding_never_reaches_a_result() -> None:
    agree(draw("nystromformer(landmarks=4)", rows=13, heads=2, batch=2, lengths=[13, 7]), "mixer", lse=False)


def test_a_sample_shorter_than_its_landmarks() -> None:
    agree(draw("nystromformer(landmarks=6)", rows=13, heads=1, lengths=[13, 4]), "mixer", lse=False)


def test_queries_and_keys_differ_in_number() -> None:
    agree(draw("nystromformer(landmarks=4, taps=0)", rows=5, keys=13, heads=2), "mixer", lse=False)
    with pytest.raises(ValueError, match="use taps=0"):
        answer(draw("nystromformer(landmarks=4)", rows=5, keys=13), "mixer", False)


def test_strides_of_the_inputs_do_not_matter() -> None:
    call = draw("nystromformer(landmarks=4)", rows=13)
    turned = call.changed(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    same("out", answer(turned, "mixer", False)[0], truth(call)[0])
    wide = replace(call, v=call.v[:1].expand_as(call.v))
    same("out", answer(wide, "mixer", False)[0], truth(wide)[0])


def test_segment_means_by_loop() -> None:
    x = torch.randn(1, 1, 10, 2, dtype=torch.float64)
    for landmarks in (1, 3, 4, 10):
        got = segment_means(x, landmarks, None)
        for s in range(landmarks):
            members = [x[0, 0, t] for t in range(10) if t * landmarks // 10 == s]
            same("mean", got[0, 0, s], torch.stack(members).mean(0))


def test_the_iteration_reaches_the_inverse() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.softmax(
        3 * torch.eye(6, dtype=torch.float64) + torch.randn(6, 6, generator=g, dtype=torch.float64), -1
    )
    same("inverse", iterative_inverse(a, 20), torch.linalg.inv(a), tolerance=1e-9)


def twin(call: Call) -> tuple[Tensor, None]:
    """As many landmarks as tokens: a product of three softmaxes, whole and in the call's own precision."""
    q, k = call.q * call.q.shape[-1] ** -0.5, call.k
    a = torch.softmax(q @ k.transpose(-1, -2), -1)
    z = a.transpose(-1, -2) / (a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1))[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    az = a @ z
    z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return a @ (z @ (a @ call.v)), None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_within_the_twins_budget(dtype: torch.dtype) -> None:
    call = draw("nystromformer(landmarks=12, iterations=1, taps=0)", rows=12, dim=16, dtype=dtype)
    within_budget(call, "mixer", twin)


def test_what_it_refuses_it_explains() -> None:
    for text, more, words in (
        ("causal", {}, "runs mixers"),
        ("nystromformer", {"lse": True}, "no log-denominator"),
        ("nystromformer", {"masked": True}, "use key_lengths for padding"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            sc.plan(text, (1, 4, 64, 16), kernel="mixer", **more)
