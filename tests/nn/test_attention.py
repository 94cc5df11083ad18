"""The layer: shapes, cross-attention, padding, streams, buffers, and decoding that equals the whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import saccade as sc

DIM, HEADS = 16, 4
SELF = [
    "full",
    "causal",
    "gqa(2) + rope + window(5)",
    "mqa + causal + alibi",
    "bilinear + causal",
    "additive(4)",
    "luong_attention(local=predictive, half=3)",
    "moba(block=4, top=1)",
    "linformer(rank=4, length=12)",
    "linear",
    "gqa(2) + causal + linear",
    "causal + performer_favor(8)",
    "efficient_attention",
    "nystromformer(landmarks=3)",
    "routing_transformer(clusters=2, window=3)",
    "by_head(window(3), causal + linear)",
    "mix(causal, causal + linear)",
    "aaren",
]


@pytest.mark.parametrize("text", SELF)
def test_features_in_and_out(text: str) -> None:
    layer = sc.nn.Attention(DIM, HEADS, text)
    x = torch.randn(2, 12, DIM, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    y.square().mean().backward()
    assert torch.isfinite(x.grad).all()
    for name, p in layer.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"


@pytest.mark.parametrize("text", SELF)
def test_a_training_step_moves_every_parameter(text: str) -> None:
    layer = sc.nn.Attention(DIM, HEADS, text)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = torch.randn(2, 12, DIM)
    (layer(x) * torch.randn(2, 12, DIM)).sum().backward()
    optimizer.step()
    still = [n for n, p in layer.named_parameters() if torch.equal(p, before[n])]
    assert not still


def test_sizes_of_projections() -> None:
    layer = sc.nn.Attention(24, 6, "kv_heads(2)", head_dim=8, value_dim=5, context_dim=7, bias=True)
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    assert shapes["query_proj.weight"] == (48, 24)
    assert shapes["key_proj.weight"] == (16, 7)
    assert shapes["value_proj.weight"] == (10, 7)
    assert shapes["out_proj.weight"] == (24, 30)
    assert shapes["key_proj.bias"] == (16,)
    assert layer(torch.randn(2, 9, 24), torch.randn(2, 4, 7)).shape == (2, 9, 24)
    assert "kv_heads(2)" in repr(layer)


def test_weights_and_buffers_stand_under_their_own_names() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "luong_attention(score=concat, local=predictive)")
    names = {n for n, _ in layer.named_parameters()}
    assert {"additive_q", "additive_k", "additive_v"} <= names
    assert any(n.startswith("streams.centre.") for n in names)
    assert [n for n, _ in sc.nn.Attention(DIM, HEADS, "causal + performer_favor(8)").named_buffers()] == [
        "favor"
    ]
    learned = sc.nn.Attention(DIM, HEADS, "aaren")
    assert learned.query.shape == (HEADS, DIM // HEADS)
    assert learned.query_proj is None


def test_the_layer_is_its_projections_around_the_call() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "gqa(2) + rope + causal")
    x = torch.randn(2, 9, DIM)
    q, k, v = layer.project(x)
    assert (q.shape, k.shape, v.shape) == ((2, 4, 9, 4), (2, 2, 9, 4), (2, 2, 9, 4))
    torch.testing.assert_close(q[:, 1], layer.query_proj(x)[..., 4:8])
    out = sc.attend(q, k, v, layer.mechanism)
    torch.testing.assert_close(layer(x), layer.out_proj(out.transpose(1, 2).reshape(2, 9, DIM)))


def test_equals_the_multihead_attention_of_pytorch() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "full", bias=True)
    other = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(
            torch.cat([layer.query_proj.weight, layer.key_proj.weight, layer.value_proj.weight])
        )
        other.in_proj_bias.copy_(
            torch.cat([layer.query_proj.bias, layer.key_proj.bias, layer.value_proj.bias])
        )
        other.out_proj.load_state_dict(layer.out_proj.state_dict())
    x, memory = torch.randn(2, 9, DIM), torch.randn(2, 5, DIM)
    padding = torch.arange(9)[None] >= torch.tensor([[6], [9]])
    torch.testing.assert_close(layer(x), other(x, x, x)[0])
    torch.testing.assert_close(layer(x, memory), other(x, memory, memory)[0])
    got = layer(x, key_lengths=torch.tensor([6, 9]))
    torch.testing.assert_close(got[0, :6], other(x, x, x, key_padding_mask=padding)[0][0, :6])
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, mask=mask[None, None]), other(x, x, x, attn_mask=~mask)[0])


@pytest.mark.parametrize(
    "text",
    [
        "full",
        "causal",
        "window(3)",
        "linear",
        "efficient_attention",
        "additive(3)",
        "linformer(rank=3, length=12)",
        "luong_attention(local=predictive, half=3)",
        "nystromformer(landmarks=3, taps=0)",
        "by_head(full, linear)",
    ],
)
def test_cross_attention(text: str) -> None:
    layer = sc.nn.Attention(DIM, HEADS, text, context_dim=6)
    x, memory = torch.randn(2, 5, DIM), torch.randn(2, 9, 6)
    y = layer(x, memory)
    assert y.shape == (2, 5, DIM)
    lengths = torch.tensor([4, 9])
    ragged = layer(x, memory, key_lengths=lengths)
    dirty = memory.clone()
    dirty[0, 4:] = 1e4
    torch.testing.assert_close(layer(x, dirty, key_lengths=lengths), ragged)
    torch.testing.assert_close(ragged[1], y[1])
    if text in ("full", "linear", "additive(3)"):
        torch.testing.assert_close(ragged[:1], layer(x[:1], memory[:1, :4]))


@pytest.mark.parametrize("text", [t for t in SELF if t != "aaren"])
def test_padding_does_not_change_the_rest(text: str) -> None:
    layer = sc.nn.Attention(DIM, HEADS, text)
    x = torch.randn(2, 12, DIM)
    lengths = torch.tensor([7, 12])
    y = layer(x, key_lengths=lengths)
    dirty = x.clone()
    dirty[0, 7:] = 100 * torch.randn(5, DIM)
    torch.testing.assert_close(layer(dirty, key_lengths=lengths)[0, :7], y[0, :7])
    torch.testing.assert_close(layer(x[:1, :7])[0], y[0, :7])
    torch.testing.assert_close(layer(x[1:])[0], y[1])


def test_streams_are_projected_to_key_positions() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "luong_attention(local=predictive, half=1)")
    net = layer.streams["centre"]
    x = 10 * torch.randn(2, 6, DIM)
    centre = net(x, 9).detach()
    assert centre.shape == (2, HEADS, 6)
    assert float(centre.min()) >= 0
    assert float(centre.max()) <= 9
    ragged = net(x, torch.tensor([3, 9]))
    torch.testing.assert_close(ragged[0], centre[0] / 3)
    found = layer(x, need=("out", "selection"))
    torch.testing.assert_close(found.selection.hi - found.selection.lo, torch.full((2, HEADS, 6), 2.0))


def test_streams_learn_where_weights_depend_on_them() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "luong_attention(local=predictive, half=4)")
    layer(torch.randn(1, 8, DIM)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.streams.parameters())


def test_refresh_moves_centroids_towards_the_tokens() -> None:
    layer = sc.nn.Attention(8, 1, "routing_transformer(clusters=2, local=false)")
    kinds = torch.randn(2, 8) * 3
    x = kinds[torch.randint(0, 2, (4, 32))] + 0.01 * torch.randn(4, 32, 8)

    def cohesion() -> float:
        q, _, _ = layer.project(x)
        near = nn.functional.normalize(
            nn.functional.layer_norm(q, q.shape[-1:]), dim=-1
        ) @ layer.centroids.transpose(-1, -2)
        return float(near.detach().amax(-1).mean())

    before = cohesion()
    for _ in range(30):
        layer.refresh(x)
    assert cohesion() > max(before, 0.7)
    torch.testing.assert_close(layer.centroids.norm(dim=-1), torch.ones(1, 2))


def test_refresh_leaves_padding_out_and_forward_leaves_buffers_alone() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "routing_transformer(clusters=2, local=false)")
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 12, DIM)
    before = layer.centroids.clone()
    layer(x)
    assert torch.equal(layer.centroids, before)
    layer.refresh(x, torch.tensor([5, 12]))
    dirty = x.clone()
    dirty[0, 5:] = 100.0
    twin.refresh(dirty, torch.tensor([5, 12]))
    torch.testing.assert_close(layer.centroids, twin.centroids)
    assert not torch.equal(layer.centroids, before)


@pytest.mark.parametrize(
    "text",
    [
        "causal",
        "gqa(2) + rope + window(5)",
        "bilinear + causal",
        "causal + linear",
        "causal + performer_favor(8)",
        "moba(block=4, top=1)",
        "by_head(window(3), causal + linear)",
        "mix(causal, causal + linear)",
        "aaren",
    ],
)
def test_steps_equal_the_whole(text: str) -> None:
    layer = sc.nn.Attention(DIM, HEADS, text).double()
    x = torch.randn(2, 14, DIM, dtype=torch.float64)
    want = layer(x)
    state, rows = layer.init_state(2), []
    for piece in (x[:, :4], *x[:, 4:].split(1, dim=1)):
        y, state = layer.step(piece, state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), want)
    assert state.length == 14


@pytest.mark.parametrize("text", ["causal + centred_span(2)", "causal + gauss_gate(3)"])
def test_in_a_step_predicted_positions_are_among_the_keys_so_far(text: str) -> None:
    layer = sc.nn.Attention(DIM, HEADS, text).double()
    x = 3 * torch.randn(2, 9, DIM, dtype=torch.float64)
    state = layer.init_state(2)
    for t in range(9):
        y, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(y, layer(x[:, : t + 1])[:, -1:])


def test_what_cannot_step_says_so() -> None:
    with pytest.raises(sc.NotSupported, match="token by token"):
        sc.nn.Attention(DIM, HEADS, "full").init_state(1)


def test_more_than_the_output() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "causal")
    x = torch.randn(2, 9, DIM)
    found = layer(x, need=("out", "lse", sc.Weights(heads=(0,)), "mass"))
    torch.testing.assert_close(found.out, layer(x))
    assert found.weights.shape == (2, 1, 9, 9)
    torch.testing.assert_close(found.mass.sum(-1), torch.full((2, HEADS), 9.0))


def test_layers_save_and_load_by_safetensors(tmp_path: Path) -> None:
    layer = sc.nn.Attention(DIM, HEADS, "causal + performer_favor(8)")
    save_file(layer.state_dict(), tmp_path / "layer")
    other = sc.nn.Attention(DIM, HEADS, "causal + performer_favor(8)")
    x = torch.randn(1, 9, DIM)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(load_file(tmp_path / "layer"))
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_layers_in_other_dtypes(dtype: torch.dtype) -> None:
    for text in (
        "gqa(2) + rope + window(5)",
        "causal + performer_favor(8)",
        "additive(4)",
        "luong_attention(local=predictive)",
    ):
        layer = sc.nn.Attention(DIM, HEADS, text).to(dtype)
        y = layer(torch.randn(1, 9, DIM, dtype=dtype))
        assert y.dtype == dtype
        assert torch.isfinite(y).all()


def test_wrong_sizes_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match="dim=16 is not divisible by heads=3; give head_dim"):
        sc.nn.Attention(16, 3)
    with pytest.raises(ValueError, match="dim and heads must be at least 1, got dim=16 and heads=0"):
        sc.nn.Attention(16, 0)
    with pytest.raises(sc.MechanismError, match=r"do not divide 4 query heads; use one of \[1, 2, 4\]"):
        sc.nn.Attention(16, 4, "gqa(3)")
    with pytest.raises(sc.MechanismError, match="need a multiple of 3 heads"):
        sc.nn.Attention(16, 4, "by_head(full, causal, linear)")
    with pytest.raises(sc.NotSupported, match="at most 8 tokens, got 9"):
        sc.nn.Attention(16, 4, "linformer(rank=4, length=8)")(torch.randn(1, 9, 16))
    with pytest.raises(sc.NotSupported, match="head_dim must be even, got 5"):
        sc.nn.Attention(20, 4, "rope")(torch.randn(1, 9, 20))
