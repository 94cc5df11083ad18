"""S272, MPNN with a virtual node: it is linear attention, estimates softmax attention, and shortens every path to two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn import LinearVirtualNode
from saccade.parts.feature import Favor
from systems.helpers import dense, exponent, qkv, train

pytestmark = pytest.mark.system("S272")


@pytest.mark.parametrize("nodes", [1, 9, 200])
def test_its_messages_make_it_linear_attention(nodes: int) -> None:
    layer = LinearVirtualNode(32, 4)
    q, k, v = (x.transpose(1, 2)[0] for x in qkv(1, 4, nodes, 8, dtype=torch.float32))
    found = layer.tell(q, k, v, torch.zeros(nodes, dtype=torch.long)).transpose(0, 1)[None]
    whole = (x.transpose(0, 1)[None] for x in (q, k, v))
    torch.testing.assert_close(found, sc.attend(*whole, "linear"), atol=1e-6, rtol=0)


def test_random_features_estimate_softmax_attention_with_error_of_the_root() -> None:
    sizes, errors = [32, 128, 512, 2048], []
    q, k, v = qkv(1, 2, 40, 8)
    q, k = q / 2, k / 2
    expected = dense(q, k, v)
    graph = torch.zeros(40, dtype=torch.long)
    for m in sizes:
        squares = []
        for draw in range(12):
            feature = Favor(m, "independent")
            layer = LinearVirtualNode(16, 2, feature, torch.Generator().manual_seed(draw))
            found = layer.tell(*(x[0].transpose(0, 1) for x in (q, k, v)), graph).transpose(0, 1)
            squares.append((found - expected[0]).square().mean())
        errors.append(float(torch.stack(squares).mean().sqrt()))
    slope = exponent(sizes, errors)
    print(f"error {errors}, slope {slope:.2f}")
    assert -0.7 <= slope <= -0.3


PATH, KINDS = 20, 4


def paths(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Paths of PATH nodes: features (size * PATH, KINDS + 2), edges, each node's path, and the kind of each first node.

    Every node has a kind of its own; the two ends are marked.
    """
    kinds = torch.randint(0, KINDS, (size, PATH), generator=generator)
    marks = torch.zeros(size, PATH, 2)
    marks[:, 0, 0] = marks[:, -1, 1] = 1
    x = torch.cat((F.one_hot(kinds, KINDS).float(), marks), dim=-1).flatten(0, 1)
    ids = torch.arange(size * PATH).view(size, PATH)
    onward = torch.stack((ids[:, :-1].flatten(), ids[:, 1:].flatten()))
    return (
        x,
        torch.cat((onward, onward.flip(0)), dim=1),
        torch.arange(size).repeat_interleave(PATH),
        kinds[:, 0],
    )


class Reader(nn.Module):
    """Three rounds of messages, then a linear map of each path's last node."""

    def __init__(self, virtual: bool) -> None:
        super().__init__()
        self.lift, self.body = nn.Linear(KINDS + 2, 32), sc.nn.MPNN(32, depth=3, virtual=virtual)
        self.head = nn.Linear(32, KINDS)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        nodes, _ = self.body(self.lift(x), edges, graph, graphs=len(x) // PATH)
        return self.head(nodes[PATH - 1 :: PATH])


def far_end(virtual: bool) -> float:
    """Accuracy of the last node about the first one's kind."""
    torch.manual_seed(0)
    model, generator = Reader(virtual), torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        x, edges, graph, kinds = paths(32, generator)
        return F.cross_entropy(model(x, edges, graph), kinds)

    train(model.parameters(), loss, 300, rate=5e-3)
    x, edges, graph, kinds = paths(1000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(x, edges, graph).argmax(-1) == kinds).float().mean())


def test_three_layers_reach_the_far_end_of_a_path_by_the_virtual_node_alone() -> None:
    found, blind = far_end(True), far_end(False)
    print(f"far end of a path: {found:.3f} with the virtual node, {blind:.3f} without")
    assert found >= 0.95
    assert abs(blind - 1 / KINDS) <= 0.05
