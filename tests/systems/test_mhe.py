"""S126, heads that differ by embeddings alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from systems.digit_rows import RowClassifier, accuracy
from systems.helpers import qkv, stepwise

DIM, HEADS, D = 32, 4, 8
pytestmark = pytest.mark.system("S126")
each_mode = pytest.mark.parametrize("mode", ["mul", "add"])


def embeddings() -> dict[str, Tensor]:
    return {f"embed_{n}": torch.randn(HEADS, D, dtype=torch.float64) for n in "qkv"}


def formula(q: Tensor, k: Tensor, v: Tensor, e: dict[str, Tensor], mode: str, causal: bool = False) -> Tensor:
    """Embedded queries, keys and values of every head, pair by pair; q, k and v hold one head."""
    b, _, n, d = q.shape

    def embed(x: Tensor, vector: Tensor) -> Tensor:
        return x + vector if mode == "add" else x * (1 + vector)

    out = torch.zeros(b, HEADS, n, d, dtype=q.dtype)
    for at in range(b):
        for h in range(HEADS):
            for i in range(n):
                row = embed(q[at, 0, i], e["embed_q"][h])
                keys = range(i + 1 if causal else n)
                s = torch.stack([row @ embed(k[at, 0, j], e["embed_k"][h]) / math.sqrt(d) for j in keys])
                for w, j in zip(s.softmax(0), keys, strict=True):
                    out[at, h, i] = out[at, h, i] + w * embed(v[at, 0, j], e["embed_v"][h])
    return out


@each_mode
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_formula_with_gradients(mode: str, causal: bool) -> None:
    q, k, v = qkv(2, 1, 7, D)
    e = embeddings()
    leaves = [x.requires_grad_() for x in (q, k, v, *e.values())]
    text = f"{'causal + ' * causal}mhe(mode={mode})"
    got = sc.attend(q.expand(-1, HEADS, -1, -1), k, v, text, params=e)
    want = formula(q, k, v, e, mode, causal)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    mine, truth = (torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) for y in (got, want))
    for name, a, b in zip(("q", "k", "v", *e), mine, truth, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, msg=name)


def test_key_embeddings_that_are_added_change_nothing() -> None:
    q, k, v = qkv(2, 1, 7, D)
    e = embeddings()
    other = e | {"embed_k": torch.randn(HEADS, D, dtype=torch.float64)}
    torch.testing.assert_close(formula(q, k, v, e, "add"), formula(q, k, v, other, "add"))
    assert float((formula(q, k, v, e, "mul") - formula(q, k, v, other, "mul")).abs().max()) > 0.1


def test_scaling_heads_runs_on_the_kernels_of_multi_query_attention() -> None:
    shape = sc.Shape(1, 8, 512, 64, kv_heads=1)
    mine, plain = (sc.plan(f"causal + {m}", shape).kernel for m in ("mhe", "mqa"))
    assert mine == plain


@each_mode
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_three_vectors_a_head_are_all_that_heads_cost(mode: str, heads: int) -> None:
    """With a width of `heads` x d: 3 n d weights besides one head's, where multi-head attention needs (3 n^2 - 3 n) d^2."""

    def projections(layer: sc.nn.Attention) -> int:
        return sum(p.numel() for n, p in layer.named_parameters() if not n.startswith("out_proj"))

    dim = heads * D
    own = projections(sc.nn.Attention(dim, heads, f"mhe(mode={mode})"))
    single = projections(sc.nn.Attention(dim, 1, "full", head_dim=D))
    many = projections(sc.nn.Attention(dim, heads, "full"))
    assert own - single == 3 * heads * D
    assert many - single == (3 * heads**2 - 3 * heads) * D**2


@each_mode
def test_without_embeddings_every_head_is_the_single_head(mode: str) -> None:
    layer = sc.nn.Attention(DIM, HEADS, f"causal + mhe(mode={mode})").double()
    for name in ("embed_q", "embed_k", "embed_v"):
        torch.nn.init.zeros_(layer.get_parameter(name))
    single = sc.nn.Attention(DIM, 1, "causal", head_dim=D).double()
    for name in ("query_proj", "key_proj", "value_proj"):
        single.get_submodule(name).load_state_dict(layer.get_submodule(name).state_dict())
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    one = sc.attend(*single.project(x), "causal")
    params = {n: layer.get_parameter(n) for n in layer.weight_names}
    heads = sc.attend(*layer.project(x), layer.mechanism, params=params)
    torch.testing.assert_close(heads, one.expand(-1, HEADS, -1, -1), atol=1e-12, rtol=0)


@each_mode
def test_the_cache_holds_one_head(mode: str) -> None:
    x = torch.randn(2, 12, DIM)
    layer = sc.nn.Attention(DIM, HEADS, f"causal + mhe(mode={mode})")
    found, held = stepwise(layer, x)
    torch.testing.assert_close(found, layer(x))
    many = stepwise(sc.nn.Attention(DIM, HEADS, "causal"), x)[1]
    assert [HEADS * n for n in held] == many


@each_mode
def test_rows_without_keys_are_zero(mode: str) -> None:
    q, k, v = qkv(2, 1, 5, D)
    found = sc.attend(
        q.expand(-1, HEADS, -1, -1),
        k,
        v,
        f"mhe(mode={mode})",
        params=embeddings(),
        key_lengths=torch.tensor([0, 5]),
    )
    assert not found[0].any()
    assert found[1].all()


def attention_weights(mechanism: str) -> int:
    """Learned numbers of the attention layer of a classifier of digits."""
    return sum(p.numel() for p in RowClassifier(mechanism).attention.parameters())


def test_digits_are_read_with_half_the_weights() -> None:
    assert attention_weights("mhe") < 0.5 * attention_weights("full")
    assert accuracy("mhe", 0) > 0.9


@pytest.mark.slow
@each_mode
def test_digits_are_read_as_well_as_by_multi_head_attention(mode: str) -> None:
    """Means of three runs."""
    mine, full = (sum(accuracy(m, seed) for seed in range(3)) / 3 for m in (f"mhe(mode={mode})", "full"))
    assert mine >= full - 0.02, (mine, full)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(sc.MechanismError, match="mode must be one of mul, add, got 'sum'"):
        sc.mechanism("mhe(mode=sum)")
    with pytest.raises(sc.MechanismError, match="needs bilinear"):
        sc.mechanism("mhe + additive")
