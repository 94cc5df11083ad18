"""Where q, k and v come from: named tensors, slices of the input, learned queries."""

from __future__ import annotations

import math

import pytest
import torch

import saccade as sc

DIM, HEADS = 16, 4


def test_queries_and_keys_of_another_tensor_decide_the_weights() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "sources(q=layout, k=layout)", source_dims={"layout": 6}).double()
    x, layout = torch.randn(2, 9, DIM, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
    found = layer(x, sources={"layout": layout}, need=("out", "weights"))
    q, k = layout @ layer.query_proj.weight.T, layout @ layer.key_proj.weight.T
    v = x @ layer.value_proj.weight.T
    mixed = torch.empty_like(x)
    for h in range(HEADS):
        own = slice(4 * h, 4 * h + 4)
        w = torch.softmax(q[..., own] @ k[..., own].mT / math.sqrt(4), -1)
        torch.testing.assert_close(found.weights[:, h], w)
        mixed[..., own] = w @ v[..., own]
    torch.testing.assert_close(found.out, mixed @ layer.out_proj.weight.T)
    other = layer(torch.randn_like(x), sources={"layout": layout}, need=("out", "weights"))
    assert torch.equal(other.weights, found.weights)


def test_one_source_for_a_whole_batch() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "sources(q=code, k=code) + causal")
    x, code = torch.randn(3, 7, DIM), torch.randn(1, 7, DIM)
    torch.testing.assert_close(
        layer(x, sources={"code": code}), layer(x, sources={"code": code.expand(3, -1, -1)})
    )


def test_sources_of_new_tokens_in_decoding() -> None:
    layer = sc.nn.Attention(
        DIM, HEADS, "sources(q=code, v=other, kv=2) + rope + causal", source_dims={"other": 5}
    )
    x, given = torch.randn(2, 7, DIM), {"code": torch.randn(2, 7, DIM), "other": torch.randn(2, 7, 5)}
    whole, state, rows = layer(x, sources=given), layer.init_state(2), []
    for t in range(7):
        y, state = layer.step(x[:, t : t + 1], state, sources={n: s[:, t : t + 1] for n, s in given.items()})
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), whole)


def test_a_slice_is_an_identity_projection() -> None:
    bare = sc.nn.Attention(DIM, HEADS, "causal + sources(k=slice, v=slice)")
    plain = sc.nn.Attention(DIM, HEADS, "causal")
    assert bare.key_proj is None
    assert bare.value_proj is None
    with torch.no_grad():
        plain.query_proj.weight.copy_(bare.query_proj.weight)
        plain.out_proj.weight.copy_(bare.out_proj.weight)
        plain.key_proj.weight.copy_(torch.eye(DIM))
        plain.value_proj.weight.copy_(torch.eye(DIM))
    x = torch.randn(2, 7, DIM)
    torch.testing.assert_close(bare(x), plain(x))
    context = torch.randn(2, 5, DIM)
    crossed = sc.nn.Attention(DIM, HEADS, "sources(v=slice)")
    assert crossed(x, context).shape == x.shape


def test_learned_queries_pool_the_keys_that_are_there() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "learned_queries(3)")
    assert layer.query.shape == (HEADS, 3, 4)
    x = torch.randn(2, 3, DIM)
    x[1, 2] = math.nan
    lengths = torch.tensor([3, 2])
    found = layer(x, key_lengths=lengths, need=("out", "mass"))
    torch.testing.assert_close(found.out[1:], layer(x[1:, :2]))
    torch.testing.assert_close(found.mass[1].sum(-1), torch.full((HEADS,), 3.0))
    found.out.sum().backward()
    assert torch.isfinite(layer.query.grad).all()


def test_learned_queries_have_no_causal_form() -> None:
    with pytest.raises(sc.NotSupported, match="its causal relative: learned_query"):
        sc.mechanism("causal + learned_queries(2)")


def test_members_of_a_combination_share_their_sources() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "by_head(sources(q=a) + window(3), sources(q=a))")
    x = torch.randn(1, 6, DIM)
    assert layer(x, sources={"a": x}).shape == x.shape
    with pytest.raises(
        sc.MechanismError, match=r"mix: its members take q from different sources, \['a', 'input'\]"
    ):
        sc.nn.Attention(DIM, HEADS, "mix(sources(q=a), window(3))")


def test_wrong_sources_are_refused() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "sources(q=layout, k=layout)")
    x = torch.randn(2, 6, DIM)
    with pytest.raises(ValueError, match=r"takes sources=\{...\} with layout, got none"):
        layer(x)
    with pytest.raises(ValueError, match="got layout, boxes"):
        layer(x, sources={"layout": x, "boxes": x})
    with pytest.raises(ValueError, match=r"must be \(2 or 1, tokens, width\), got \(3, 6, 16\)"):
        layer(x, sources={"layout": torch.randn(3, 6, DIM)})
    with pytest.raises(ValueError, match="source_dims names boxes"):
        sc.nn.Attention(DIM, HEADS, "sources(q=layout)", source_dims={"boxes": 4})
    with pytest.raises(ValueError, match="do not cover"):
        sc.nn.Attention(DIM, HEADS, "sources(v=slice)", head_dim=8)
    with pytest.raises(sc.MechanismError, match=r"learned_queries\(rows\) learns queries"):
        sc.mechanism("sources(q=learned)")
    with pytest.raises(sc.MechanismError, match="must be a word"):
        sc.mechanism("sources(q=3)")
    with pytest.raises(sc.MechanismError, match="do not divide"):
        sc.nn.Attention(DIM, HEADS, "sources(q=a, kv=3)")


def test_the_text_round_trips() -> None:
    m = sc.mechanism("sources(q=layout, k=layout, kv=2) + causal")
    assert sc.mechanism(str(m)) == m
    assert (m.source("q"), m.source("k"), m.source("v"), m.kv_heads(4)) == ("layout", "layout", "input", 2)
