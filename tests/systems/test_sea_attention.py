"""S217, SEA: a compressed attention map is predicted in linear time and chooses the keys of each query."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade import reference
from saccade.kernels import gated
from saccade.parts.base import Sizes
from saccade.systems.sea import FILTERS, WAVES, TopColumns
from systems.digit_patches import PatchViT, captured, distilled, taught
from systems.helpers import below, dense, exponent, flops, qkv, stepwise

pytestmark = pytest.mark.system("S217")

Named = dict[str, dict[str, Tensor]]


def named(text: str, heads: int, kv: int, dim: int, dtype: torch.dtype = torch.float64) -> Named:
    sizes = Sizes(heads, kv, dim, dim)
    m = sc.mechanism(text)
    return {
        "params": {
            n: torch.randn(w.shape, dtype=dtype) * max(w.std, 0.2) for n, w in m.weights(sizes).items()
        },
        "buffers": {n: x.to(dtype) for n, x in m.buffers(sizes, None).items()},
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_all_keys_without_the_mix_are_softmax_attention(length: int, causal: bool) -> None:
    q, k, v = qkv(2, 4, length, 8, kv=2)
    text = ("causal + " if causal else "") + "sea_attention(40, columns=6, mix=false)"
    found = sc.attend(q, k, v, text, **named(text, 4, 2, 8))
    torch.testing.assert_close(found, dense(q, k, v, below(length) if causal else None), atol=1e-12, rtol=0)


def test_running_sums_equal_a_loop() -> None:
    q, k, v = qkv(2, 3, 150, 6)
    wanted = (q @ k.transpose(-1, -2)).tril() @ v
    found = gated.advance(q, k, v, None, None, q.new_zeros(2, 3, 6, 6), None)[0]
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def predicted(q: Tensor, k: Tensor, v: Tensor, given: Named, i: int, keys: int, h: int) -> Tensor:
    """The map of one row of one head as the words say: features, context, net, convolution."""
    p, w = given["params"], given["buffers"]["favor"][h]

    def phi(x: Tensor) -> Tensor:
        x = x * len(x) ** -0.25
        return torch.exp(w @ x - x.square().sum() / 2)

    def code(t: int) -> Tensor:
        rates = [10 ** (-3 * n / (WAVES - 1)) for n in range(WAVES)]
        return torch.tensor([f(t * r) for f in (math.cos, math.sin) for r in rates], dtype=torch.float64)

    weights = [phi(q[i]) @ phi(k[j]) for j in range(keys)]
    read = sum(x * torch.cat((v[j], code(j))) for j, x in enumerate(weights)) / sum(weights)
    seen = torch.cat((q[i], read, code(i)))
    s = torch.relu(seen @ p["map_in"][h] + p["map_bias"][h]) @ p["map_out"][h]
    padded = F.pad(s, (1, 1))
    inner = torch.stack(
        [
            torch.stack([torch.relu(p["map_filter"][f, 0] @ padded[u : u + 3]) for u in range(len(s))])
            for f in range(FILTERS)
        ]
    )
    inner = F.pad(inner, (1, 1))
    more = [sum(p["map_merge"][0, f] @ inner[f, u : u + 3] for f in range(FILTERS)) for u in range(len(s))]
    return s + torch.stack(more)


@pytest.mark.parametrize("looks_back", [False, True])
def test_the_map_and_the_choice_equal_the_formula(looks_back: bool) -> None:
    q, k, v = qkv(1, 2, 23, 6)
    text = "sea_attention(7, columns=5, features=9, hidden=4)"
    given = named(text, 2, 2, 6)
    part = TopColumns(7, 5, 9, 4)
    c = replace(reference.context(q, k, v, **given), looks_back=looks_back)
    s, chosen = part.predicted(c), part.choose(c)
    for h in range(2):
        for i in range(23):
            n = i + 1 if looks_back else 23
            row = predicted(q[0, h], k[0, h], v[0, h], given, i, n, h)
            torch.testing.assert_close(s[0, h, i], row, atol=1e-9, rtol=0)
            found: list[int] = []
            for u in sorted(range(5), key=lambda u: -float(row[u])):
                found += reversed(range(u * n // 5, (u + 1) * n // 5))
            got = chosen.index[0, h, i][chosen.valid[0, h, i]].tolist()
            assert sorted(got) == sorted(found[:7])


@pytest.mark.parametrize("looks_back", [False, True])
def test_the_loss_is_the_divergence_from_the_dense_map_over_columns(looks_back: bool) -> None:
    q, k, v = qkv(1, 2, 12, 6)
    text = ("causal + " if looks_back else "") + "sea_attention(4, columns=5, features=9, hidden=4)"
    given = named(text, 2, 2, 6)
    found = sc.attend(q, k, v, text, need=("losses",), **given).losses["map"]
    total = 0.0
    for h in range(2):
        for i in range(12):
            n = i + 1 if looks_back else 12
            a = torch.softmax(k[0, h, :n] @ q[0, h, i] / math.sqrt(6), 0)
            row = predicted(q[0, h], k[0, h], v[0, h], given, i, n, h)
            full = [u for u in range(5) if (u + 1) * n // 5 > u * n // 5]
            truth = torch.stack([a[u * n // 5 : (u + 1) * n // 5].sum() for u in full])
            total += float((truth * (truth.log() - torch.log_softmax(row[full], 0))).sum()) / 24
    assert float(found) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_gathered_keys_equal_a_masked_matrix_and_its_gradients(causal: bool) -> None:
    text = ("causal + " if causal else "") + "sea_attention(12, columns=8, mix=false)"
    given = named(text, 4, 2, 16, torch.float32)
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 100, 16, kv=2, dtype=torch.float32))
    found = sc.attend(q, k, v, text, kernel="gather", need=("out", "selection"), **given)
    j = torch.arange(100)
    exist = found.selection.exist(slice(0, 100), j, j)
    wanted = dense(q, k, v, exist & below(100) if causal else exist)
    torch.testing.assert_close(found.out, wanted, atol=1e-5, rtol=0)
    for a, b in zip(
        *(torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (found.out, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_mean_value_is_mixed_in_by_a_gate_of_the_query() -> None:
    q, k, v = qkv(2, 4, 30, 8, kv=2)
    text = "causal + sea_attention(6, columns=4)"
    given = named(text, 4, 2, 8)
    bare = {n: x for n, x in given["params"].items() if n.startswith("map")}
    sparse = sc.attend(
        q, k, v, "causal + sea_attention(6, columns=4, mix=false)", params=bare, buffers=given["buffers"]
    )
    found = sc.attend(q, k, v, text, **given)
    for i in range(30):
        for h in range(4):
            gate = torch.sigmoid(
                q[:, h, i] @ given["params"]["context_mix"][h] + given["params"]["context_bias"][h]
            )
            mean = v[:, h // 2, : i + 1].mean(1)
            wanted = gate[:, None] * sparse[:, h, i] + (1 - gate[:, None]) * mean
            torch.testing.assert_close(found[:, h, i], wanted, atol=1e-12, rtol=0)
    with pytest.raises(sc.NotSupported, match="follows no mask of single pairs; use key_lengths"):
        sc.attend(q, k, v, text, mask=torch.ones(1, 1, 30, 30, dtype=torch.bool), **given)


def test_non_zeros_and_work_grow_linearly() -> None:
    lengths, kept, counted = [512, 1024, 2048], [], []
    text = "causal + sea_attention(32)"
    given = named(text, 1, 1, 16, torch.float32)
    for n in lengths:
        q, k, v = qkv(1, 1, n, 16, dtype=torch.float32)
        chosen = sc.attend(q, k, v, text, need=("selection",), **given).selection
        kept.append(int(chosen.valid.sum()))
        counted.append(flops(lambda x=(q, k, v): sc.attend(*x, text, kernel="gather", **given)))
    assert kept == [32 * n - 32 * 31 // 2 for n in lengths]
    assert exponent(lengths, counted) < 1.05


def test_it_decodes_as_it_trains_since_the_map_is_made_row_by_row() -> None:
    assert sc.mechanism("causal + sea_attention").causality == "safe"
    layer = sc.nn.Attention(32, 4, "causal + sea_attention(6, columns=5)").double()
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_a_map_distilled_from_a_trained_teacher_holds_more_of_its_mass_than_near_patches() -> None:
    torch.manual_seed(0)
    teacher = taught(PatchViT("full"), 200, 0)
    student = distilled(PatchViT("sea_attention(16)"), copy.deepcopy(teacher), 80, 0, lambda x: x["map"])
    assert student.accuracy() >= teacher.accuracy() - 0.02
    for chosen, near in captured(student, 16):
        assert chosen >= near + 0.1
