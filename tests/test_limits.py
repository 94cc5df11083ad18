"""Sizes at their limits: windows larger than what they look at, tokens, points and nodes alone, nothing at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import saccade as sc
from systems.helpers import below, dense, qkv

LARGE = {
    "window(64)": "causal",
    "dilated(64, step=1)": "causal",
    "causal + chunk(64)": "causal",
    "causal + sink(64)": "causal",
    "strided(1)": "causal",
    "powerattention(local=64)": "causal",
    "causal + document((64, 64))": "causal",
    "neighborhood(65)": "full",
    "chunk(64)": "full",
    "global(64)": "full",
    "prefix(64)": "full",
    "document((64, 64))": "full",
    "permuted(65, length=6)": "full",
    "neighborhood(5, dilation=9)": "alone",
    "dilated(4, step=100)": "alone",
    "window(1)": "alone",
    "document((1, 1, 1, 1, 1, 1))": "alone",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("text", LARGE)
def test_a_window_beyond_the_sequence_reads_all_of_it_and_a_step_beyond_it_the_token_alone(
    text: str, dtype: torch.dtype
) -> None:
    q, k, v = qkv(2, 4, 6, 8, dtype=dtype)
    want = {"causal": dense(q, k, v, below(6)), "full": dense(q, k, v), "alone": v}[LARGE[text]]
    torch.testing.assert_close(sc.attend(q, k, v, text), want)


@pytest.mark.parametrize("text", ["na(9, border=drop)", "na((2, 3))", "na((9, 5), border=drop)"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_window_beyond_the_image_reads_all_of_it_where_the_border_drops(
    text: str, dtype: torch.dtype
) -> None:
    q, k, v = qkv(1, 2, 6, 8, dtype=dtype)
    torch.testing.assert_close(sc.attend(q, k, v, text, grid=(2, 3)), dense(q, k, v))


@pytest.mark.parametrize("text", ["na(9)", "gna(9)", "fna(9)", "gna(4)"])
def test_a_window_beyond_the_image_is_refused_where_it_would_move_inwards(text: str) -> None:
    q, k, v = qkv(1, 2, 6, 8)
    with pytest.raises(
        sc.MechanismError, match="cannot move inwards; take a window of at most 2, or border=drop"
    ):
        sc.attend(q, k, v, text, grid=(2, 3))


@pytest.mark.parametrize("halo", [0, 3])
def test_a_block_beyond_the_image_is_the_whole_image(halo: int) -> None:
    layer = sc.nn.Attention(8, 2, f"halonet(8, halo={halo})").double()
    for a in range(2):
        nn.init.zeros_(getattr(layer, f"rel_axis_{a}"))
    plain = sc.nn.Attention(8, 2).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x, grid=(2, 3)), plain(x))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("neighborhood(4)", "width must be odd.*use 3 or 5, or window"),
        ("neighborhood(8, dilation=2)", "width must be odd.*use 7 or 9"),
        ("permuted(4, length=6)", "width must be odd.*use 3 or 5"),
        ("fna(8)", "window must be odd, got 8; use 7 or 9, or gna"),
        ("dynamic_conv(4)", "odd number, got width 4; take an odd one or causal=true"),
        ("entmax(0.9)", "alpha must be a number of at least 1, got 0.9"),
        ("entmax(-1)", "alpha must be a number of at least 1, got -1"),
        ("gqa(0)", "kv must be a whole number of at least 1, got 0"),
    ],
)
def test_even_windows_alphas_below_one_and_no_heads_are_refused(text: str, why: str) -> None:
    with pytest.raises(sc.MechanismError, match=why):
        sc.mechanism(text)


HEADLESS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: sc.nn.Attention(8, 0),
    "transformer": lambda: sc.nn.Transformer(9, dim=8, depth=1, heads=0),
    "pmas": lambda: sc.nn.PMA(8, 0, 1),
    "sets": lambda: sc.nn.SetTransformer(2, 5, 4, dim=8, heads=0),
    "points": lambda: sc.nn.PPFAttention(8, 0),
    "paths": lambda: sc.nn.PathAttention(8, 0),
    "complex": lambda: sc.nn.ComplexAttention(8, 0),
    "skim": lambda: sc.nn.SkimAttention(8, 0, 4),
    "positional": lambda: sc.nn.PositionalAttention(8, 0),
    "regions": lambda: sc.nn.RegionRouting(8, 0),
    "relations": lambda: sc.nn.RelationalAttention(8, 0),
    "dual": lambda: sc.nn.DualAttention(8, 0, 0),
    "graphs": lambda: sc.nn.GINAttention(8, 0),
    "virtual": lambda: sc.nn.LinearVirtualNode(8, 0),
    "sources": lambda: sc.nn.MultiSourceAttention(8, 0, 2, "serial"),
    "spans": lambda: sc.nn.SpanConvAttention(8, 0),
    "bridge": lambda: sc.nn.PointBridge(8, 0),
    "pointer": lambda: sc.nn.PointerNetwork(2, 8, heads=0),
}


@pytest.mark.parametrize("name", HEADLESS)
def test_no_module_is_made_without_heads(name: str) -> None:
    with pytest.raises(ValueError, match="heads=0"):
        HEADLESS[name]()


def test_no_call_is_made_without_heads() -> None:
    q, k, v = qkv(2, 0, 6, 8)
    with pytest.raises(ValueError, match="0 query heads, and there is at least one of each"):
        sc.attend(q, k, v, "causal")


FIVE = torch.zeros(1, 5, dtype=torch.long)
TABLES: dict[str, Callable[[], object]] = {
    "learned positions": lambda: sc.nn.LearnedPositions(4, 8)(torch.randn(1, 5, 8)),
    "decoder": lambda: sc.nn.Transformer(9, dim=8, depth=1, heads=2, max_length=4)(FIVE),
    "encoder": lambda: sc.nn.Encoder(9, 8, 1, 2, max_length=4)(FIVE),
    "target": lambda: sc.nn.EncoderDecoder(9, 8, 1, 2, max_length=4)(FIVE[:, :3], FIVE),
    "codes": lambda: sc.nn.PositionalAttention(8, 2, max_length=4)(torch.randn(1, 5, 8)),
    "complex": lambda: sc.nn.ComplexAttention(8, 2, max_length=4)(torch.randn(1, 5, 8)),
}


@pytest.mark.parametrize("name", TABLES)
def test_positions_beyond_a_learned_table_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="5 tokens are more than max_length=4; "):
        TABLES[name]()


@pytest.mark.parametrize("text", ["rel_table(2)", "t5_bias", "shaw_rpr", "cope_contextual", "rope", "alibi"])
def test_relative_tables_have_no_end(text: str) -> None:
    layer = sc.nn.Attention(16, 2, text)
    assert bool(layer(torch.randn(1, 40, 16)).isfinite().all())


def cloud(count: int) -> tuple[Tensor, Tensor]:
    """Points and unit normals, (1, count, 3)."""
    return torch.randn(1, count, 3).double(), nn.functional.normalize(
        torch.randn(1, count, 3), dim=-1
    ).double()


def test_one_point_hears_itself() -> None:
    layer, x, (p, n) = sc.nn.PPFAttention(8, 2).double(), torch.randn(1, 1, 8).double(), cloud(1)
    p.requires_grad_()
    value = layer.qkv_proj(x).chunk(3, -1)[2]
    r = layer.relations(p, n, torch.zeros(1, 1, 1, dtype=torch.long))[:, :, 0]
    found = layer(x, p, n)
    torch.testing.assert_close(found, layer.out_proj(value + layer.value_relation(r)))
    found.sum().backward()
    assert p.grad is not None
    assert bool(p.grad.isfinite().all())


def test_points_at_one_place_and_no_points() -> None:
    layer, (p, n) = sc.nn.PPFAttention(8, 2).double(), cloud(3)
    found = layer(torch.randn(1, 3, 8).double(), p[:, :1].expand(1, 3, 3), n)
    assert bool(found.isfinite().all())
    assert layer(torch.randn(1, 0, 8).double(), p[:, :0], n[:, :0]).shape == (1, 0, 8)


@pytest.mark.parametrize(("one", "other"), [(1, 1), (1, 5), (5, 1)])
def test_a_cloud_of_one_point_is_matched(one: int, other: int) -> None:
    a, b = cloud(one), cloud(other)
    log = sc.nn.PointMatcher(8, 2).double()((a[0], b[0]), (a[1], b[1]))
    assert log.shape == (1, one + 1, other + 1)
    torch.testing.assert_close(log.exp()[:, :, :-1].sum(1), torch.ones(1, other).double(), atol=1e-3, rtol=0)


def test_an_empty_set_answers_what_its_seeds_are() -> None:
    pool = sc.nn.PMA(8, 2, 3).double()
    nothing, hidden = pool(torch.randn(1, 0, 8).double()), torch.zeros(1, 4, dtype=torch.bool)
    torch.testing.assert_close(pool(torch.full((1, 4, 8), torch.nan).double(), hidden), nothing)
    assert bool(nothing.isfinite().all())


@pytest.mark.parametrize("virtual", [True, False])
def test_a_node_without_edges_hears_itself_and_a_graph_may_be_empty(virtual: bool) -> None:
    model = sc.nn.MPNN(8, depth=2, virtual=virtual).double()
    x, graph = torch.randn(4, 8).double(), torch.tensor([0, 0, 0, 2])
    edges, none = torch.tensor([[0, 1], [1, 0]]), torch.zeros(2, 0, dtype=torch.long)
    nodes, whole = model(x, edges, graph, graphs=3)
    torch.testing.assert_close(nodes[3:], model(x[3:], none)[0])
    torch.testing.assert_close(whole[1:2], model(x[:0], none)[1])
    if not virtual:
        torch.testing.assert_close(nodes[2:3], model(x[2:3], none)[0])
