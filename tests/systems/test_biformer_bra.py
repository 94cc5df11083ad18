"""S234, BiFormer: regions of an image choose regions, and their cells attend to the cells of these."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn import regions as nn_regions
from saccade.tasks.digits import Digits
from systems.helpers import FRESH, exponent, train

pytestmark = pytest.mark.system("S234")


def routing(regions: int, top: int) -> sc.nn.RegionRouting:
    torch.manual_seed(0)
    return sc.nn.RegionRouting(16, heads=2, regions=regions, top=top).double()


def masked(m: sc.nn.RegionRouting, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cell by cell: the regions' means choose, a mask over all pairs follows, plus the convolution."""
    height, width = grid
    tall, wide = math.ceil(height / m.regions), math.ceil(width / m.regions)
    owner = torch.tensor(
        [(c // width // tall) * m.regions + c % width // wide for c in range(height * width)]
    )
    q, k, v = m.query_proj(x), m.key_proj(x), m.value_proj(x)
    out = torch.zeros_like(x)
    for b in range(len(x)):
        filled = sorted(set(owner.tolist()))
        means = {r: (q[b, owner == r].mean(0), k[b, owner == r].mean(0)) for r in filled}
        for r in filled:
            scores = {s: float((means[r][0] @ means[s][1]).detach()) for s in filled}
            best = sorted(filled, key=scores.__getitem__, reverse=True)[: m.top]
            keys = torch.isin(owner, torch.tensor(best))
            for h in range(m.heads):
                part = slice(h * 8, h * 8 + 8)
                s = q[b, owner == r][:, part] @ k[b, keys][:, part].T / math.sqrt(8)
                out[b, owner == r, part] = s.softmax(-1) @ v[b, keys][:, part]
    local = m.local(v.transpose(1, 2).reshape(len(x), 16, height, width)).flatten(2).transpose(1, 2)
    return m.out_proj(out + local)


@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (9, 5), (3, 5)])
@pytest.mark.parametrize(("regions", "top"), [(4, 3), (2, 1), (1, 1), (4, 16)])
def test_gathered_regions_equal_the_mask_and_its_gradients(
    grid: tuple[int, int], regions: int, top: int
) -> None:
    m, x = routing(regions, top), torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    found, truth = m(x, grid=grid), masked(m, x, grid)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    weights = list(m.parameters())
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), weights) for y in (found, truth)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("grid", [(8, 8), (7, 10)])
def test_all_regions_are_full_attention_and_the_convolution(grid: tuple[int, int]) -> None:
    m, x = routing(3, 9), torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (m.query_proj, m.key_proj, m.value_proj))
    full = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    local = m.local(m.value_proj(x).transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(m(x, grid=grid), m.out_proj(full + local), atol=1e-12, rtol=0)


def test_scores_at_the_best_number_of_regions_grow_with_four_thirds() -> None:
    sides = (32, 64, 128, 256)
    best = [
        min(
            sc.nn.RegionRouting(8, 1, regions=r, top=1).entries((n, n))
            for r in range(1, n // 2)
            if n % r == 0
        )
        for n in sides
    ]
    assert 1.25 < exponent([n * n for n in sides], [float(x) for x in best]) < 1.4


@pytest.mark.parametrize("grid", [(8, 8), (7, 10)])
def test_the_scores_are_as_many_as_counted(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[int] = []

    def seen(q: Tensor, k: Tensor, v: Tensor, **options: Tensor) -> Tensor:
        met.append(q[0, :, 0, :, 0].numel() * k.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(nn_regions, "scaled_dot_product_attention", seen)
    m = routing(4, 3)
    m(torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64), grid=grid)
    between = m.regions**2 * m.regions**2
    assert met[0] + between == m.entries(grid)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"top between 1 and regions\^2, got regions=2 and top=5"):
        sc.nn.RegionRouting(16, 2, regions=2, top=5)
    with pytest.raises(ValueError, match="kernel must be odd"):
        sc.nn.RegionRouting(16, 2, kernel=4)
    with pytest.raises(ValueError, match="multiple of heads"):
        sc.nn.RegionRouting(16, 3)
    with pytest.raises(ValueError, match="has 12 cells, but x has 10"):
        sc.nn.RegionRouting(16, 2)(torch.zeros(1, 10, 16), grid=(3, 4))


class Reader(nn.Module):
    """Digits through one region routing layer."""

    def __init__(self, top: int) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(1, 32, 3, padding=1), nn.LayerNorm(32)
        self.mix = sc.nn.RegionRouting(32, 2, regions=4, top=top, kernel=3)
        self.read = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.enter(images).flatten(2).transpose(1, 2)
        x = x + self.mix(self.norm(x), grid=(8, 8))
        image = F.relu(x).transpose(1, 2).unflatten(2, (8, 8))
        return self.read(F.adaptive_avg_pool2d(image, 2).flatten(1))


def read(top: int, seed: int = FRESH) -> float:
    """Test accuracy on digits after a short training."""
    torch.manual_seed(seed)
    digits, generator, model = Digits(seed=seed), torch.Generator().manual_seed(seed), Reader(top)

    def loss(step: int) -> Tensor:
        images, labels = digits.batch(64, generator)
        return F.cross_entropy(model(images), labels)

    train(model.parameters(), loss, 250, rate=1e-2)
    images, labels = digits.test
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def test_a_quarter_of_the_regions_reads_digits_as_well_as_all() -> None:
    pytest.importorskip("sklearn")
    full, quarter = read(16), read(4)
    assert full > 0.94
    assert quarter >= full - 0.02
