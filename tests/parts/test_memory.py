"""Decay and ratio against the recurrence itself, token by token in plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc


def recurrence(q: Tensor, k: Tensor, v: Tensor, gamma: float, ratio: bool, elu: bool) -> list[list[float]]:
    """out_t = phi(q_t) S_t with S_t = gamma S_{t-1} + phi(k_t) v_t, of one head, in plain numbers."""

    def phi(x: list[float]) -> list[float]:
        return [c + 1 if c > 0 else math.exp(c) for c in x] if elu else x

    n, d = q.shape
    e = v.shape[1]
    state = [[0.0] * e for _ in range(d)]
    norm = [0.0] * d
    rows = []
    for t in range(n):
        key, query, value = phi(k[t].tolist()), phi(q[t].tolist()), v[t].tolist()
        state = [[gamma * state[m][c] + key[m] * value[c] for c in range(e)] for m in range(d)]
        norm = [gamma * norm[m] + key[m] for m in range(d)]
        below = sum(query[m] * norm[m] for m in range(d)) if ratio else 1.0
        rows.append([sum(query[m] * state[m][c] for m in range(d)) / below for c in range(e)])
    return rows


@pytest.mark.parametrize(
    ("text", "gammas", "ratio", "elu"),
    [
        ("causal + identity", [1.0, 1.0], False, False),
        ("causal + linear", [1.0, 1.0], True, True),
        ("causal + identity + fixed_decay(first=1.0)", [0.5, 0.75], False, False),
        ("causal + elu1 + ratio + fixed_decay(first=1.0)", [0.5, 0.75], True, True),
    ],
)
def test_the_parallel_form_is_the_recurrence(text: str, gammas: list[float], ratio: bool, elu: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 3, dtype=torch.float64)
    for got in (sc.reference.attend(q, k, v, text), sc.attend(q, k, v, text)):
        for h in range(2):
            want = recurrence(q[0, h], k[0, h], v[0, h], gammas[h], ratio, elu)
            torch.testing.assert_close(
                got[0, h], torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-11
            )


def test_grouped_heads_share_a_state_and_its_decay() -> None:
    q, k, v = (
        torch.randn(1, 4, 7, 3).double(),
        torch.randn(1, 2, 7, 3).double(),
        torch.randn(1, 2, 7, 3).double(),
    )
    got = sc.attend(q, k, v, "causal + identity + fixed_decay(first=1.0)")
    for h in range(4):
        want = recurrence(q[0, h], k[0, h // 2], v[0, h // 2], [0.5, 0.75][h // 2], False, False)
        torch.testing.assert_close(got[0, h], torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-11)


def test_without_a_limit_every_query_reads_the_final_state() -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 3, dtype=torch.float64)
    got = sc.attend(q, k, v, "linear")
    for i in range(6):
        turned = torch.cat((q[:, :, :i], q[:, :, i + 1 :], q[:, :, i : i + 1]), 2)
        want = recurrence(turned[0, 0], k[0, 0], v[0, 0], 1.0, True, True)[-1]
        assert got[0, 0, i].tolist() == pytest.approx(want, abs=1e-11)


def test_a_ratio_needs_weights_that_cannot_cancel() -> None:
    with pytest.raises(sc.MechanismError, match="ratio needs denominator"):
        sc.mechanism("causal + identity + ratio")


def test_a_channel_ratio_reads_all_keys_so_it_has_no_causal_form() -> None:
    with pytest.raises(sc.NotSupported, match=r"channel_ratio .* its causal relative: ratio"):
        sc.mechanism("causal + elu1 + channel_ratio")


def test_decay_needs_an_order() -> None:
    with pytest.raises(sc.MechanismError, match="add `causal`"):
        sc.mechanism("fixed_decay + identity")


@pytest.mark.parametrize("text", ["causal + favor(8)", "favor(8)"])
def test_features_with_a_scale_of_their_own_need_a_ratio_to_cancel_it(text: str) -> None:
    with pytest.raises(sc.MechanismError, match="favor needs ratio"):
        sc.mechanism(text)
