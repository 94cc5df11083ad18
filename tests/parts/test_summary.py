"""Summaries against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

import saccade as sc
from saccade.parts.summary import LengthProject


def params(groups: int, rank: int, length: int) -> dict[str, torch.Tensor]:
    shape = (groups, rank, length)
    return {n: torch.randn(shape, dtype=torch.float64) for n in ("project_k", "project_v")}


@pytest.mark.parametrize("keys", [5, 8])
def test_keys_and_values_are_mixed_along_the_length(keys: int) -> None:
    k, v = torch.randn(2, 3, keys, 4, dtype=torch.float64), torch.randn(2, 3, keys, 2, dtype=torch.float64)
    p = params(3, 6, 8)
    got_k, got_v = LengthProject(6, 8).reduce(k, v, None, p)
    assert got_k.shape == (2, 3, 6, 4)
    assert got_v.shape == (2, 3, 6, 2)
    for got, x, name in ((got_k, k, "project_k"), (got_v, v, "project_v")):
        for b in range(2):
            for g in range(3):
                for m in range(6):
                    for c in range(x.shape[-1]):
                        want = sum(p[name][g, m, s].item() * x[b, g, s, c].item() for s in range(keys))
                        assert got[b, g, m, c].item() == pytest.approx(want, abs=1e-12)


def test_linformer_by_loops() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 3, dtype=torch.float64)
    p = params(2, 4, 8)
    got = sc.reference.attend(q, k, v, "linformer(rank=4, length=8)", params=p)
    e, f = p["project_k"], p["project_v"]
    for h in range(2):
        keys = [
            [sum(e[h, m, s].item() * k[0, h, s, c].item() for s in range(5)) for c in range(3)]
            for m in range(4)
        ]
        values = [
            [sum(f[h, m, s].item() * v[0, h, s, c].item() for s in range(5)) for c in range(3)]
            for m in range(4)
        ]
        for i in range(5):
            w = [
                math.exp(sum(q[0, h, i, c].item() * keys[m][c] for c in range(3)) / math.sqrt(3))
                for m in range(4)
            ]
            for c in range(3):
                want = sum(w[m] / sum(w) * values[m][c] for m in range(4))
                assert got[0, h, i, c].item() == pytest.approx(want, abs=1e-12)


def test_identity_maps_give_softmax_attention() -> None:
    q, k, v = torch.randn(3, 2, 2, 8, 4, dtype=torch.float64)
    eye = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    got = sc.attend(q, k, v, "linformer(rank=8, length=8)", params={"project_k": eye, "project_v": eye})
    torch.testing.assert_close(got, sc.attend(q, k, v, "full"))


def test_padding_has_no_effect() -> None:
    k, v = torch.randn(2, 1, 3, 8, 4, dtype=torch.float64)
    p = params(3, 6, 8)
    valid = torch.arange(8)[None] < 5
    dirty_k, dirty_v = k.clone(), v.clone()
    dirty_k[:, :, 5:], dirty_v[:, :, 5:] = math.nan, math.nan
    got = LengthProject(6, 8).reduce(dirty_k, dirty_v, valid, p)
    want = LengthProject(6, 8).reduce(k[:, :, :5], v[:, :, :5], None, p)
    torch.testing.assert_close(got, want)


def test_longer_input_is_refused_with_the_fix() -> None:
    q = torch.randn(1, 2, 9, 4)
    with pytest.raises(
        sc.NotSupported, match=r"at most 8 tokens, got 9; make it with length=9 or use performer_favor"
    ):
        sc.attend(
            q, q, q, "linformer(rank=4, length=8)", params={n: x.float() for n, x in params(2, 4, 8).items()}
        )


def test_positions_have_no_meaning_among_summaries() -> None:
    with pytest.raises(sc.NotSupported, match="its causal relative: performer_favor or moba"):
        sc.mechanism("causal + linformer")
    for text in ("neighborhood(5) + linformer", "alibi + linformer", "top_blocks(4) + linformer"):
        with pytest.raises(sc.MechanismError, match="asks where a key stands"):
            sc.mechanism(text)
