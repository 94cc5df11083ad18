"""Messages along the edges of graphs, and one virtual node a graph that all its nodes share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from saccade.parts.base import Sizes
from saccade.parts.feature import Elu1, Feature
from saccade.parts.memory import divide


def perceptron(before: int, hidden: int, after: int) -> nn.Module:
    """Two linear maps around a GELU; with `hidden=0` one linear map without a bias."""
    if not hidden:
        return nn.Linear(before, after, bias=False)
    return nn.Sequential(nn.Linear(before, hidden), nn.GELU(), nn.Linear(hidden, after))


def check_graph(x: Tensor, edges: Tensor | None, graph: Tensor, graphs: int) -> None:
    """Raises where nodes x (N, ...), edges (2, E) and each node's graph (N,) below `graphs` do not belong together."""
    nodes = len(x)
    if graph.dtype != torch.long or graph.shape != (nodes,):
        raise ValueError(
            f"graph must hold one int64 for each of {nodes} nodes, got {graph.dtype} {tuple(graph.shape)}"
        )
    if nodes and (int(graph.min()) < 0 or int(graph.max()) >= graphs):
        raise ValueError(f"graph must lie in 0..{graphs - 1}, got {int(graph.min())}..{int(graph.max())}")
    if edges is None:
        return
    if edges.dtype != torch.long or edges.dim() != 2 or len(edges) != 2:
        raise ValueError(
            f"edges must be int64 (2, edges), from and to, got {edges.dtype} {tuple(edges.shape)}"
        )
    if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= nodes):
        raise ValueError(f"edges must name nodes 0..{nodes - 1}, got {int(edges.min())}..{int(edges.max())}")
    if edges.numel() and not torch.equal(graph[edges[0]], graph[edges[1]]):
        raise ValueError(
            "an edge joins nodes of two graphs; number the nodes of a batch one graph after the other"
        )


def gathered(x: Tensor, where: Tensor, count: int) -> Tensor:
    """Sums of the rows of x (N, ...) that go to the same place, (count, ...), in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(count, *x.shape[1:], dtype=wide, device=x.device).index_add(0, where, x.to(wide))


class VirtualNodeLayer(nn.Module):
    """Nodes hear their neighbours and the virtual node of their graph, which then hears all nodes; O(N + E).

    h = x + u[graph]; x' = h + mlp((1 + eps) n + sum over edges of n), n = norm h;
    u' = u + mlp([u; read over the graph of message(norm x')]). Nodes x (N, dim) of all graphs together, virtual nodes
    u (graphs, dim). (Cai et al., On the Connection Between MPNN and Graph Transformer, 2023; the node update from Xu
    et al., How Powerful are Graph Neural Networks?, 2019.)
    """

    def __init__(self, dim: int, virtual: bool = True, read: Literal["sum", "mean"] = "mean") -> None:
        super().__init__()
        if read not in ("sum", "mean"):
            raise ValueError(f"read must be sum or mean, got {read!r}")
        self.virtual, self.read = virtual, read
        self.eps = nn.Parameter(torch.zeros(()))
        self.norm, self.node = nn.LayerNorm(dim), perceptron(dim, 2 * dim, dim)
        if virtual:
            self.message = nn.Sequential(nn.LayerNorm(dim), perceptron(dim, dim, dim))
            self.update = perceptron(2 * dim, 2 * dim, dim)

    def forward(self, x: Tensor, u: Tensor, edges: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:
        check_graph(x, edges, graph, len(u))
        if self.virtual:
            x = x + u[graph]
        n = self.norm(x)
        x = x + self.node((1 + self.eps) * n + gathered(n[edges[0]], edges[1], len(n)).to(n.dtype))
        if not self.virtual:
            return x, u
        told = gathered(self.message(x), graph, len(u))
        if self.read == "mean":
            told = told / torch.bincount(graph, minlength=len(u)).clamp_min(1).unsqueeze(-1)
        return x, u + self.update(torch.cat((u, told.to(u.dtype)), dim=-1))


class MPNN(nn.Module):
    """`depth` rounds of messages on graphs, with a virtual node unless `virtual=False`; O(depth (N + E)).

    (Cai et al., On the Connection Between MPNN and Graph Transformer, 2023.)

    >>> edges = torch.tensor([[0, 1], [1, 0]])
    >>> nodes, whole = MPNN(8, depth=2)(torch.zeros(3, 8), edges, torch.tensor([0, 0, 1]), graphs=2)
    >>> nodes.shape, whole.shape
    (torch.Size([3, 8]), torch.Size([2, 8]))
    """

    def __init__(
        self, dim: int, depth: int, virtual: bool = True, read: Literal["sum", "mean"] = "mean"
    ) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(dim))
        self.layers = nn.ModuleList(VirtualNodeLayer(dim, virtual, read) for _ in range(depth))

    def forward(
        self, x: Tensor, edges: Tensor, graph: Tensor | None = None, graphs: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Nodes x (N, dim), edges (2, E) from and to, each node's graph (N,), all 0 unless given.

        Answers nodes (N, dim) and virtual nodes (graphs, dim); a graph may have no node, a node no edge.
        """
        graph = torch.zeros(len(x), dtype=torch.long, device=x.device) if graph is None else graph
        u = self.start.expand(graphs, -1)
        for layer in self.layers:
            x, u = layer(x, u, edges, graph)
        return x, u


class LinearVirtualNode(nn.Module):
    """A virtual node that hears phi(k) v^T and phi(k) from all nodes and tells each phi(q)^T S / phi(q)^T z.

    So the nodes of each graph attend to one another linearly: x (N, dim) to (N, dim) in O(N). With phi = Favor(m) it
    estimates softmax attention. (Cai et al., On the Connection Between MPNN and Graph Transformer, 2023.)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        feature: Feature = Elu1(),  # noqa: B008
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not divisible by heads={heads}")
        if type(feature).place is not Feature.place:
            raise ValueError(
                f"{feature.name} asks where a token stands, and nodes have no order; use elu1 or favor"
            )
        self.heads, self.feature = heads, feature
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        size = dim // heads
        self.buffer_names = tuple(feature.buffers(Sizes(heads, heads, size, size), generator))
        for name, buffer in feature.buffers(Sizes(heads, heads, size, size), generator).items():
            self.register_buffer(name, buffer)

    def tell(self, q: Tensor, k: Tensor, v: Tensor, graph: Tensor, graphs: int = 1) -> Tensor:
        """What each node is told, (N, heads, e), from q and k (N, heads, d) and v (N, heads, e)."""
        check_graph(q, None, graph, graphs)
        buffers = {name: self.get_buffer(name) for name in self.buffer_names}
        wide = torch.promote_types(q.dtype, torch.float32)
        asks, _ = self._phi(q.to(wide), "q", buffers)
        phi, scale = self._phi(k.to(wide), "k", buffers)
        if scale is not None:
            top = scale.new_full((graphs, scale.shape[1]), -torch.inf)
            top = top.scatter_reduce(0, graph[:, None].expand_as(scale), scale, "amax")
            phi = phi * torch.exp(scale - top[graph]).unsqueeze(-1)
        heard = torch.cat((phi.unsqueeze(-1) * v.unsqueeze(-2), phi.unsqueeze(-1)), dim=-1)
        told = torch.einsum("nhm,nhme->nhe", asks.to(wide), gathered(heard, graph, graphs)[graph])
        return divide(told[..., :-1], told[..., -1:]).to(q.dtype)

    def _phi(
        self, x: Tensor, side: Literal["q", "k"], buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        phi, scale = self.feature.map(x.transpose(0, 1)[None], side, None, buffers)
        return phi[0].transpose(0, 1), None if scale is None else scale[0].transpose(0, 1)

    def forward(self, x: Tensor, graph: Tensor | None = None, graphs: int = 1) -> Tensor:
        """Nodes x (N, dim) and each node's graph (N,), all 0 unless given, to (N, dim)."""
        graph = torch.zeros(len(x), dtype=torch.long, device=x.device) if graph is None else graph
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)) for p in (self.query_proj, self.key_proj, self.value_proj)
        )
        return self.out_proj(self.tell(q, k, v, graph, graphs).flatten(1))
