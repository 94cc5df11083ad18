"""S001, bridging visual representations (RelationNet++): queries read the hottest corner and centre points of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.bridge import GeometryBias, key_points
from systems.helpers import train

pytestmark = pytest.mark.system("S001")


def bridge(points: int = 6, **options: int | float) -> sc.nn.PointBridge:
    torch.manual_seed(0)
    made = sc.nn.PointBridge(8, heads=2, points=points, cells=32, unit=2.0, **options).double()
    nn.init.normal_(made.out_proj.weight, std=0.3)
    return made


def inputs(height: int = 4, width: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, their places, features and heat."""
    x, at = torch.randn(2, 7, 8, dtype=torch.float64), 12 * torch.rand(2, 7, 2, dtype=torch.float64)
    features = torch.randn(2, 8, height, width, dtype=torch.float64)
    return x, at, features, torch.rand(2, height, width, dtype=torch.float64)


def written_out(m: sc.nn.PointBridge, x: Tensor, at: Tensor, features: Tensor, heat: Tensor) -> Tensor:
    """The formula, one query, head and point at a time."""
    out, d = x.clone(), x.shape[-1] // m.heads
    width, rows = heat.shape[2], []
    for b in range(len(x)):
        hottest = sorted(range(heat[b].numel()), key=lambda c: -float(heat[b].flatten()[c]))[: m.points]
        cells = [(c // width, c % width) for c in hottest]
        for i in range(x.shape[1]):
            mixed = []
            for h in range(m.heads):
                cut = slice(h * d, (h + 1) * d)
                q = (m.query_proj.weight @ x[b, i])[cut]
                logits, values = [], []
                for r, c in cells:
                    f = features[b, :, r, c]
                    gap = at[b, i] - torch.tensor([c + 0.5, r + 0.5], dtype=x.dtype) * 3
                    logits.append(q @ (m.key_proj.weight @ f)[cut] / d**0.5 + sampled(m.geometry, gap)[h])
                    values.append((m.value_proj.weight @ f)[cut])
                w = torch.stack(logits).softmax(0)
                mixed.append(sum(a * v for a, v in zip(w, values, strict=True)))
            rows.append(x[b, i] + m.out_proj(torch.cat(mixed)))
    out = torch.stack(rows).view_as(x)
    return out


def sampled(g: GeometryBias, gap: Tensor) -> Tensor:
    """The bias between the four nodes around an offset."""
    place = gap / g.unit + g.cells // 2
    low = [min(max(math.floor(float(p)), 0), g.cells - 2) for p in place]
    total = torch.zeros(1, dtype=gap.dtype)
    for step_x in (0, 1):
        for step_y in (0, 1):
            node = torch.tensor([low[0] + step_x, low[1] + step_y], dtype=gap.dtype)
            share = (1 - (place - node).abs()).prod()
            total = total + share * g.direct((node - g.cells // 2) * g.unit)
    return total


@pytest.mark.parametrize("points", [1, 6, 20, 50])
def test_the_formula_and_its_gradients(points: int) -> None:
    m, (x, at, features, heat) = bridge(points), inputs()
    leaves = [x.requires_grad_(), features.requires_grad_(), *m.parameters()]
    found, wanted = m(x, at, features, heat, stride=3.0), written_out(m, x, at, features, heat)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((wanted * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_all_points_are_dense_biased_attention() -> None:
    m, (x, at, features, heat) = bridge(50), inputs()
    cells = features.flatten(2).mT
    places = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(4), indexing="xy"), -1).flatten(0, 1)
    offsets = at[:, :, None] - (places + 0.5)[None, None]
    q, k, v = (
        net(y).unflatten(-1, (2, -1)).transpose(1, 2)
        for net, y in ((m.query_proj, x), (m.key_proj, cells), (m.value_proj, cells))
    )
    w = (q @ k.mT / 2 + m.geometry(offsets)).softmax(-1)
    dense = x + m.out_proj((w @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x, at, features, heat), dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(m(x, at, features, 1 - heat), dense, atol=1e-12, rtol=0)
    assert (bridge(5)(x, at, features, heat) - dense).abs().max() > 1e-3


def test_a_new_bridge_changes_nothing() -> None:
    m = sc.nn.PointBridge(8, heads=2, points=6).double()
    x, at, features, heat = inputs()
    assert torch.equal(m(x, at, features, heat), x)
    grads = torch.autograd.grad(m(x, at, features, heat).square().sum(), m.out_proj.weight)
    assert grads[0].abs().max() > 0  # and yet it learns


def test_the_grid_is_exact_on_its_nodes_and_close_between_them() -> None:
    torch.manual_seed(0)
    g = GeometryBias(4, cells=400, unit=4.0)
    node = torch.randint(-200, 200, (1, 50, 3, 2)).float()
    torch.testing.assert_close(g(4 * node), g.direct(4 * node).permute(0, 3, 1, 2), atol=1e-4, rtol=0)
    g, node = g.double(), node.double()
    torch.testing.assert_close(g(4 * node), g.direct(4 * node).permute(0, 3, 1, 2), atol=1e-9, rtol=0)
    offsets = 780 * (2 * torch.rand(1, 400, 5, 2, dtype=torch.float64) - 1)
    with torch.no_grad():
        gap = (g(offsets) - g.direct(offsets).permute(0, 3, 1, 2)).abs().max()
        assert gap < 1e-2
        assert gap < 0.05 * g.grid().std()


def test_offsets_beyond_the_grid_take_its_edge() -> None:
    g = GeometryBias(2, cells=9, unit=1.0).double()
    far = torch.tensor([[[[100.0, 2.0], [-100.0, -3.0]]]], dtype=torch.float64)
    edge = torch.tensor([[[[4.0, 2.0], [-4.0, -3.0]]]], dtype=torch.float64)
    torch.testing.assert_close(g(far), g(edge))


def test_the_hottest_cells_are_the_points() -> None:
    heat = torch.zeros(1, 3, 4)
    heat[0, 2, 1], heat[0, 0, 3] = 2.0, 1.0
    index, points = key_points(heat, 2, stride=4.0)
    assert index.tolist() == [[9, 3]]
    assert points.tolist() == [[[6.0, 10.0], [14.0, 2.0]]]


def test_masked_cells_are_not_read() -> None:
    m, (x, at, features, heat) = bridge(6), inputs()
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[1, :, 2:] = False
    broken = features.masked_fill(~mask.unsqueeze(1), math.nan)
    found = m(x, at, broken, heat, mask=mask)
    alone = m(x[1:], at[1:], features[1:, :, :, :2].contiguous(), heat[1:, :, :2])
    torch.testing.assert_close(found[1:], alone, atol=1e-12, rtol=0)
    nothing = m(x, at, broken, heat, mask=torch.zeros_like(mask))
    torch.testing.assert_close(nothing, x + m.out_proj.bias)


def test_bad_input() -> None:
    m, (x, at, features, heat) = bridge(), inputs()
    with pytest.raises(ValueError, match=r"places must be \(2, 7, 2\)"):
        m(x, at[:, :3], features, heat)
    with pytest.raises(ValueError, match=r"heat must be \(2, 4, 5\)"):
        m(x, at, features, heat[:, :2])
    with pytest.raises(ValueError, match="must be a multiple of heads"):
        sc.nn.PointBridge(9, heads=2)
    with pytest.raises(ValueError, match="points=0"):
        sc.nn.PointBridge(8, heads=2, points=0)
    with pytest.raises(ValueError, match="at least 2 cells"):
        GeometryBias(2, cells=1)


def error_of_sides(bridged: bool) -> float:
    """How far off a query tells the sides of a box, in cells of a 16 x 16 map, whose corners alone are marked."""
    torch.manual_seed(0)
    g, rows = torch.Generator().manual_seed(0), 64
    m = sc.nn.PointBridge(16, 4, points=4, context_dim=4, cells=33, unit=1.0)
    head = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def draw() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low = torch.randint(0, 7, (rows, 2), generator=g)
        high = low + torch.randint(3, 9, (rows, 2), generator=g)
        features, each = torch.zeros(rows, 4, 16, 16), torch.arange(rows)
        for n, (x, y) in enumerate([(low, low), (high, low), (low, high), (high, high)]):
            features[each, n, y[:, 1], x[:, 0]] = 1
        at = low[:, None] + torch.rand(rows, 8, 2, generator=g) * (high - low)[:, None] + 0.5
        sides = torch.cat((at - low[:, None] - 0.5, high[:, None] + 0.5 - at), -1)
        return features, features.sum(1), at, sides

    def loss(_: int) -> Tensor:
        features, heat, at, sides = draw()
        x = torch.zeros(rows, 8, 16)
        x = m(x, at, features, heat) if bridged else x
        return F.l1_loss(head(x), sides)

    return train([*m.parameters(), *head.parameters()], loss, 250, rate=1e-2)


def test_marked_corners_tell_a_query_where_the_sides_of_its_box_are() -> None:
    assert error_of_sides(True) < 0.5 * error_of_sides(False)


SIDE, KINDS, STRIDE = 64, 3, 4


@dataclass(frozen=True)
class Boxes:
    """Images (B, 3, 64, 64) of coloured boxes on noise; boxes (B, 3, 4) as x0, y0, x1, y1 and kinds (B, 3), -1 for none."""

    images: Tensor
    boxes: Tensor
    kinds: Tensor

    @classmethod
    def draw(cls, count: int, g: torch.Generator) -> Boxes:
        images = 0.25 * torch.randn(count, 3, SIDE, SIDE, generator=g)
        size = torch.randint(12, 44, (count, 3, 2), generator=g)
        low = (torch.rand(count, 3, 2, generator=g) * (SIDE - size)).long()
        kinds = torch.randint(KINDS, (count, 3), generator=g)
        kinds[torch.rand(count, 3, generator=g) < torch.tensor([0.0, 0.4, 0.4])] = -1
        boxes = torch.cat((low, low + size), -1)
        for b in range(count):
            for n in range(3):
                if kinds[b, n] >= 0:
                    x0, y0, x1, y1 = boxes[b, n].tolist()
                    images[b, :, y0:y1, x0:x1] = 0.25 * torch.randn(3, y1 - y0, x1 - x0, generator=g)
                    images[b, int(kinds[b, n]), y0:y1, x0:x1] += 1
        return cls(images, boxes.float(), kinds)


def centres() -> Tensor:
    at = (torch.arange(SIDE // STRIDE) + 0.5) * STRIDE
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).flatten(0, 1)


class Detector(nn.Module):
    """Each cell names a kind and the four sides of the box around it; heat maps say where corners are."""

    def __init__(self, bridged: bool) -> None:
        super().__init__()
        sizes = ((3, 16, 2), (16, 32, 2), (32, 32, 1))
        layers = [m for a, b, s in sizes for m in (nn.Conv2d(a, b, 3, s, 1), nn.ReLU())]
        self.trunk = nn.Sequential(*layers)
        self.corners = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 1, 1))
        self.head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, KINDS + 4))
        self.bridge = sc.nn.PointBridge(32, 4, points=16, cells=33, unit=4.0) if bridged else None
        nn.init.constant_(self.head[2].bias, -1.0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Kind logits (B, N, kinds), distances to the sides (B, N, 4) and corner logits (B, H, W)."""
        features = self.trunk(images)
        heat, x = self.corners(features).squeeze(1), features.flatten(2).mT
        if self.bridge is not None:
            x = self.bridge(x, centres().expand(len(x), -1, -1), features, heat, stride=STRIDE)
        found = self.head(x)
        return found[..., :KINDS], 16 * F.softplus(found[..., KINDS:]), heat


def focal(logits: Tensor, target: Tensor) -> Tensor:
    odds = logits.sigmoid()
    wrong = torch.where(target > 0.5, 1 - odds, odds)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * wrong.square()
    return each.sum() / target.sum().clamp_min(1)


def detection_loss(m: Detector, data: Boxes) -> Tensor:
    kinds, sides, heat = m(data.images)
    at = centres()[None, :, None]
    low, high = data.boxes[:, None, :, :2], data.boxes[:, None, :, 2:]
    wanted = torch.cat((at - low, high - at), -1)
    inside = (wanted.amin(-1) > 0) & (data.kinds >= 0)[:, None]
    top = torch.where(inside, torch.arange(1, 4), 0).amax(-1)  # later boxes lie on top
    owner, own = (top - 1).clamp_min(0), top > 0
    wanted = wanted.gather(2, owner[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
    named = data.kinds.gather(1, owner)
    target = F.one_hot(named.clamp_min(0), KINDS).float() * own.unsqueeze(-1)
    hot = torch.zeros_like(heat)
    for b, n in (data.kinds >= 0).nonzero().tolist():
        x0, y0, x1, y1 = ((data.boxes[b, n] - torch.tensor([0, 0, 1, 1])) / STRIDE).long().tolist()
        for x in (x0, x1):
            for y in (y0, y1):
                hot[b, y, x] = 1
    gap = (F.l1_loss(sides, wanted, reduction="none") / 16).sum(-1)[own].mean()
    return focal(kinds, target) + gap + 0.5 * focal(heat, hot)


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (n, 4) and (m, 4)."""
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).clamp_min(0).prod(-1) for x in (a, b)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp_min(1e-6)


@torch.no_grad()
def precision(m: Detector, data: Boxes, least: float = 0.5) -> float:
    """Average precision over all kinds together, at an overlap of `least`, duplicates suppressed."""
    kinds, sides, _ = m(data.images)
    found: list[tuple[float, bool]] = []
    total = 0
    for b in range(len(kinds)):
        score, kind = kinds[b].sigmoid().max(-1)
        order = score.argsort(descending=True)[:60]
        boxes = torch.cat((centres() - sides[b, :, :2], centres() + sides[b, :, 2:]), -1)
        kept: list[int] = []
        for n in order.tolist():
            same = [o for o in kept if kind[o] == kind[n]]
            if not same or overlaps(boxes[n : n + 1], boxes[same]).max() < 0.5:
                kept.append(n)
        real = data.kinds[b] >= 0
        total += int(real.sum())
        free = real.clone()
        for n in kept:
            match = overlaps(boxes[n : n + 1], data.boxes[b])[0] * (free & (data.kinds[b] == kind[n]))
            hit = bool(match.max() >= least)
            if hit:
                free[match.argmax()] = False
            found.append((float(score[n]), hit))
    hits, area, best = 0, 0.0, []
    for rank, (_, hit) in enumerate(sorted(found, reverse=True), 1):
        hits += hit
        best.append((hits / total, hits / rank))
    top, last = 0.0, 1.0
    for recall, exact in reversed(best):
        area += (last - recall) * top
        top, last = max(top, exact), recall
    return area + last * top


def detected(bridged: bool, seed: int, steps: int) -> float:
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    m = Detector(bridged)
    train(m.parameters(), lambda _: detection_loss(m, Boxes.draw(16, g)), steps, rate=3e-3)
    return precision(m, Boxes.draw(150, torch.Generator().manual_seed(1000 + seed)))


@pytest.mark.slow
def test_a_detector_gains_from_corner_points() -> None:
    gains = [detected(True, seed, 400) - detected(False, seed, 400) for seed in range(3)]
    assert sum(gains) / 3 >= 0.02
    assert min(gains) > 0
