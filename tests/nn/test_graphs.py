"""Messages and virtual nodes against loops over nodes and edges; nodes without an edge, graphs of one node or none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.nn import LinearVirtualNode
from saccade.nn.graphs import gathered
from saccade.parts.feature import Favor


def batch_of_graphs() -> tuple[Tensor, Tensor, Tensor]:
    """Edges (2, E), each node's graph (N,), nodes (N, 4): a path of three, one node alone, none, a pair and a hermit."""
    edges = torch.tensor([[0, 1, 1, 2, 4, 5], [1, 0, 2, 1, 5, 4]])
    return edges, torch.tensor([0, 0, 0, 1, 3, 3, 3]), torch.randn(7, 4, dtype=torch.float64)


@pytest.mark.parametrize("read", ["sum", "mean"])
def test_a_round_of_messages_is_written_out(read: str) -> None:
    edges, graph, x = batch_of_graphs()
    layer = sc.nn.VirtualNodeLayer(4, read=read).double()
    torch.nn.init.constant_(layer.eps, 0.5)
    u = torch.randn(4, 4, dtype=torch.float64)
    nodes, whole = layer(x, u, edges, graph)
    after = []
    for i in range(7):
        h = x[i] + u[graph[i]]
        total = 1.5 * layer.norm(h)
        for a, b in edges.T.tolist():
            if b == i:
                total = total + layer.norm(x[a] + u[graph[a]])
        after.append(h + layer.node(total))
    torch.testing.assert_close(nodes, torch.stack(after))
    for g in range(4):
        members = [layer.message(after[i]) for i in range(7) if graph[i] == g]
        told = sum(members, torch.zeros(4, dtype=torch.float64))
        told = told / max(1, len(members)) if read == "mean" else told
        torch.testing.assert_close(whole[g], u[g] + layer.update(torch.cat((u[g], told))))


@pytest.mark.parametrize("virtual", [True, False])
def test_graphs_of_a_batch_do_not_hear_each_other(virtual: bool) -> None:
    edges, graph, x = batch_of_graphs()
    model = sc.nn.MPNN(4, depth=3, virtual=virtual).double()
    nodes, whole = model(x, edges, graph, graphs=4)
    none = torch.zeros(2, 0, dtype=torch.long)
    for g, own in ((0, edges[:, :4]), (1, none), (2, none), (3, edges[:, 4:] - 4)):
        alone, told = model(x[graph == g], own)
        torch.testing.assert_close(nodes[graph == g], alone)
        torch.testing.assert_close(whole[g : g + 1], told)


def test_a_path_carries_one_step_a_layer_and_a_virtual_node_carries_everywhere() -> None:
    edges = torch.stack((torch.arange(9), torch.arange(9) + 1))
    edges = torch.cat((edges, edges.flip(0)), dim=1)
    x = torch.randn(10, 4, dtype=torch.float64)
    moved = x.clone()
    moved[0] = torch.randn(4)
    for virtual, reach in ((False, 3), (True, 9)):
        model = sc.nn.MPNN(4, depth=3, virtual=virtual).double()
        gap = (model(x, edges)[0] - model(moved, edges)[0]).abs().amax(-1)
        assert (gap[: reach + 1] > 0).all()
        assert not gap[reach + 1 :].any()


def test_gradients_by_differences() -> None:
    edges, graph, x = batch_of_graphs()
    model = sc.nn.MPNN(4, depth=2).double()
    assert torch.autograd.gradcheck(lambda x: model(x, edges, graph, 4), (x.requires_grad_(),))
    linear = LinearVirtualNode(4, 2).double()
    assert torch.autograd.gradcheck(lambda x: linear(x, graph, 4), (x,))


@pytest.mark.parametrize("feature", [None, Favor(16)])
def test_a_linear_virtual_node_on_ragged_graphs_is_linear_attention_on_each(feature: Favor | None) -> None:
    graph = torch.tensor([2, 0, 2, 0, 0, 3, 2])
    layer = (LinearVirtualNode(8, 2) if feature is None else LinearVirtualNode(8, 2, feature)).double()
    x = torch.randn(7, 8, dtype=torch.float64)
    found = layer(x, graph, 4)
    text = "linear" if feature is None else "performer_favor(16)"
    plain = sc.nn.Attention(8, 2, text).double()
    plain.load_state_dict(layer.state_dict())
    for g in range(4):
        torch.testing.assert_close(found[graph == g], plain(x[graph == g][None])[0])
    alone = layer.out_proj(layer.value_proj(x[graph == 3]))
    torch.testing.assert_close(found[graph == 3], alone)
    assert layer(x[:0]).shape == (0, 8)


def test_low_precision_sums_in_high() -> None:
    """Thousands of ones in bfloat16 would stop at 256."""
    ones = torch.ones(4000, 4, dtype=torch.bfloat16)
    assert gathered(ones, torch.zeros(4000, dtype=torch.long), 2).tolist() == [[4000.0] * 4, [0.0] * 4]
    layer = LinearVirtualNode(4, 1).bfloat16()
    same = layer.tell(ones[:, None], ones[:, None], ones[:, None], torch.zeros(4000, dtype=torch.long))
    assert torch.equal(same, ones[:, None])
    nodes, whole = sc.nn.MPNN(4, depth=2).bfloat16()(ones, torch.zeros(2, 1, dtype=torch.long))
    assert nodes.dtype == whole.dtype == torch.bfloat16


def test_what_is_no_graph_is_refused() -> None:
    edges, graph, x = batch_of_graphs()
    model = sc.nn.MPNN(4, depth=1).double()
    with pytest.raises(ValueError, match=r"graph must lie in 0..2, got 0..3"):
        model(x, edges, graph, graphs=3)
    with pytest.raises(ValueError, match=r"one int64 for each of 7 nodes, got torch.int64 \(6,\)"):
        model(x, edges, graph[:6], graphs=4)
    with pytest.raises(
        ValueError, match=r"edges must be int64 \(2, edges\), from and to, got torch.int64 \(6, 2\)"
    ):
        model(x, edges.T, graph, graphs=4)
    with pytest.raises(ValueError, match=r"edges must name nodes 0..6, got 0..7"):
        model(x, torch.tensor([[0], [7]]), graph, graphs=4)
    with pytest.raises(ValueError, match="an edge joins nodes of two graphs"):
        model(x, torch.tensor([[0], [3]]), graph, graphs=4)
    with pytest.raises(ValueError, match="dim=8 is not divisible by heads=3"):
        LinearVirtualNode(8, 3)
    with pytest.raises(ValueError, match="read must be sum or mean, got 'max'"):
        sc.nn.VirtualNodeLayer(4, read="max")
