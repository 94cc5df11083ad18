"""S193, grouped-query attention, and the conversion of a multi-head checkpoint."""

from __future__ import annotations

import pytest
import torch

import saccade as sc
from saccade.nn.convert import pool_heads, pool_state
from saccade.tasks import text
from systems.helpers import dense, qkv, stepwise, text_loss, train_on_text

HEADS = 8
pytestmark = pytest.mark.system("S193")


@pytest.mark.parametrize("causal", ["", "causal + "])
def test_as_many_groups_as_heads_is_multi_head_attention(causal: str) -> None:
    q, k, v = qkv(2, HEADS, 17, 4)
    many = sc.attend(q, k, v, f"{causal}transformer")
    torch.testing.assert_close(sc.attend(q, k, v, f"{causal}gqa({HEADS})"), many, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", ["", "causal + "])
def test_one_group_is_multi_query_attention(causal: str) -> None:
    q, k, v = qkv(2, HEADS, 17, 4, kv=1)
    one = sc.attend(q, k, v, f"{causal}mqa")
    torch.testing.assert_close(sc.attend(q, k, v, f"{causal}gqa(1)"), one, atol=1e-12, rtol=0)
    layer, same = (sc.nn.Attention(32, HEADS, m) for m in ("causal + gqa(1)", "causal + mqa"))
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 17, 32)
    torch.testing.assert_close(layer(x), same(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_a_head_reads_the_group_it_belongs_to(groups: int) -> None:
    q, k, v = qkv(2, HEADS, 13, 4, kv=groups)
    found = sc.attend(q, k, v, f"gqa({groups})")
    for h in range(HEADS):
        g = h * groups // HEADS
        alone = dense(q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1])
        torch.testing.assert_close(found[:, h : h + 1], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_cache_shrinks_by_the_ratio_of_heads(groups: int) -> None:
    x = torch.randn(2, 20, 64)
    few, many = (
        stepwise(sc.nn.Attention(64, HEADS, f"causal + {m}"), x)[1] for m in (f"gqa({groups})", "transformer")
    )
    assert [HEADS * n for n in few] == [groups * n for n in many]


def test_groups_must_divide_heads() -> None:
    with pytest.raises(sc.MechanismError, match="do not divide"):
        sc.nn.Attention(64, HEADS, "gqa(3)")


def test_pooling_takes_the_mean_of_a_group_of_heads() -> None:
    weight = torch.randn(HEADS * 4, 32)
    pooled = pool_heads(weight, HEADS, 2)
    for group in range(2):
        for channel in range(4):
            rows = [(group * 4 + h) * 4 + channel for h in range(4)]
            torch.testing.assert_close(pooled[group * 4 + channel], weight[rows].mean(0))
    assert torch.equal(pool_heads(weight, HEADS, HEADS), weight)
    with pytest.raises(ValueError, match="divide"):
        pool_heads(weight, HEADS, 3)


def test_conversion_of_equal_heads_changes_nothing() -> None:
    model, small = (
        sc.nn.Transformer(32, dim=32, depth=2, heads=HEADS, mechanism=m, max_length=16)
        for m in ("transformer", "gqa(2)")
    )
    for block in model.blocks:
        for projection in (block.attention.key_proj, block.attention.value_proj):
            heads = projection.weight.data.view(2, 4, 4, 32)
            heads.copy_(heads[:, :1].clone().expand_as(heads))
    small.load_state_dict(pool_state(model.state_dict(), HEADS, 2))
    tokens = torch.randint(32, (2, 16))
    torch.testing.assert_close(small(tokens), model(tokens), atol=1e-5, rtol=0)


def test_a_layer_converts_in_place_of_its_state() -> None:
    layer = sc.nn.Attention(32, HEADS, "rope + causal", bias=True)
    x = torch.randn(2, 9, 32)
    small = sc.nn.convert.grouped(layer, 2)
    by_state = sc.nn.Attention(32, HEADS, "gqa(2) + rope + causal", bias=True)
    by_state.load_state_dict(pool_state(layer.state_dict(), HEADS, 2))
    assert small.mechanism == by_state.mechanism
    assert torch.equal(small(x), by_state(x))
    torch.testing.assert_close(sc.nn.convert.grouped(layer, HEADS)(x), layer(x))
    assert layer.key_proj.weight.shape == (32, 32)
    with pytest.raises(sc.NotSupported, match="no multi-head keys and values"):
        sc.nn.convert.grouped(small, 1)
    with pytest.raises(sc.NotSupported, match="every key-value head"):
        sc.nn.convert.grouped(sc.nn.Attention(32, HEADS, "additive"), 2)
    with pytest.raises(sc.MechanismError, match="do not divide"):
        sc.nn.convert.grouped(layer, 3)


def first_heads(state: dict[str, torch.Tensor], heads: int, kv: int) -> dict[str, torch.Tensor]:
    """The first head of every group in place of the mean."""

    def first(x: torch.Tensor) -> torch.Tensor:
        return x.view(kv, heads // kv, -1, x.shape[-1])[:, 0].flatten(0, 1)

    pooled = ("key_proj.weight", "value_proj.weight")
    return {n: first(x) if n.endswith(pooled) else x for n, x in state.items()}


def fresh_heads(state: dict[str, torch.Tensor], model: sc.nn.Transformer) -> dict[str, torch.Tensor]:
    """The checkpoint, with the new key and value projections as they were drawn."""
    own, pooled = model.state_dict(), ("key_proj.weight", "value_proj.weight")
    return {n: own[n] if n.endswith(pooled) else x for n, x in state.items()}


def text_model(mechanism: str, seed: int) -> sc.nn.Transformer:
    torch.manual_seed(seed)
    model = sc.nn.Transformer(text.VOCAB, dim=64, depth=2, heads=4, mechanism=mechanism, max_length=64)
    for table in (model.embedding.tokens, model.embedding.positions):
        torch.nn.init.normal_(table.weight, std=0.1)
    return model


@pytest.mark.slow
def test_mean_pooling_keeps_more_of_a_checkpoint_than_first_heads_or_fresh_ones() -> None:
    """Losses over that of the multi-head checkpoint, means of three runs."""
    corpus, steps = text.load(window=64), 1500
    found: dict[str, list[float]] = {}
    for seed in range(3):
        many, few = text_model("transformer", seed), text_model("gqa(2)", seed)
        train_on_text(many, corpus, steps, length=64, seed=seed)
        full, state = text_loss(many, corpus, 64), many.state_dict()
        forms = {
            "mean": pool_state(state, 4, 2),
            "first": first_heads(state, 4, 2),
            "fresh": fresh_heads(state, text_model("gqa(2)", seed + 10)),
        }
        for name, form in forms.items():
            for share in (0, 5, 20) if name == "mean" else (0, 5):
                few.load_state_dict(form)
                if share:
                    train_on_text(few, corpus, steps * share // 100, length=64, seed=seed + 10)
                found.setdefault(f"{name} {share}%", []).append(text_loss(few, corpus, 64) / full)
    means = {name: sum(x) / len(x) for name, x in found.items()}
    assert means["mean 0%"] < means["first 0%"] < means["fresh 0%"]
    assert means["mean 5%"] < means["first 5%"] < means["fresh 5%"]
    assert means["mean 5%"] <= 1.15
    assert means["mean 20%"] <= 1.03
