"""S203, CBAM: gates that stay between 0 and 1, count 2C^2/r + 98 parameters, and look at the digit, not the strokes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import saccade as sc
from systems.helpers import train

pytestmark = pytest.mark.system("S203")
SIDE = 24


def test_it_is_the_channel_gate_and_then_the_spatial_gate() -> None:
    layer = sc.nn.CBAM(8, ratio=2).double()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    down, up = (p.detach() for p in layer.channel.mlp.parameters())
    expected = torch.empty_like(x)
    for b in range(2):
        pooled = [torch.stack([pool(x[b, c]) for c in range(8)]) for pool in (torch.mean, torch.max)]
        channel = torch.sigmoid(sum(up @ (down @ p).clamp_min(0) for p in pooled))
        gated = x[b] * channel[:, None, None]
        both = torch.stack((gated.mean(0), gated.amax(0)))
        filters = layer.spatial.conv.weight.detach()[0]
        for r in range(9):
            for c in range(9):
                s = torch.zeros((), dtype=torch.float64)
                for i in range(max(0, r - 3), min(9, r + 4)):
                    for j in range(max(0, c - 3), min(9, c + 4)):
                        s = s + (filters[:, i - r + 3, j - c + 3] * both[:, i, j]).sum()
                expected[b, :, r, c] = gated[:, r, c] * torch.sigmoid(s)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


def test_gates_lie_between_zero_and_one() -> None:
    layer = sc.nn.CBAM(16, ratio=4)
    x = 3 * torch.randn(8, 16, 12, 12)
    with torch.no_grad():
        for gate in (layer.channel.gate(x), layer.spatial.gate(x)):
            assert float(gate.min()) > 0
            assert float(gate.max()) < 1


@pytest.mark.parametrize(("channels", "ratio"), [(32, 16), (64, 16), (48, 4)])
def test_parameter_count(channels: int, ratio: int) -> None:
    layer = sc.nn.CBAM(channels, ratio)
    assert sum(p.numel() for p in layer.parameters()) == 2 * channels**2 // ratio + 98


@cache
def scenes(size: int, seed: int, unseen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Canvases (size, 1, SIDE, SIDE) with a digit over three bright strokes, its label, and its box (..., SIDE, SIDE)."""
    data, generator = load_digits(), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    order = order[-400:] if unseen else order[:-400]
    images, labels = torch.tensor(data.images / 16).float()[order], torch.tensor(data.target)[order]
    which = torch.randint(0, len(labels), (size,), generator=generator)
    corner = torch.randint(0, SIDE - 7, (size, 2), generator=generator)
    middle = torch.rand(size, 3, 2, 1, generator=generator) * SIDE
    angle = torch.rand(size, 3, generator=generator) * torch.pi
    along = torch.stack((angle.sin(), angle.cos()), dim=-1)[..., None] * torch.linspace(-4, 4, 17)
    canvas = torch.zeros(size, SIDE, SIDE)
    box = torch.zeros(size, SIDE, SIDE, dtype=torch.bool)
    for n, (row, column) in enumerate(corner.tolist()):
        r, c = (middle[n] + along[n]).round().long().transpose(0, 1).flatten(1)
        inside = (r >= 0) & (r < SIDE) & (c >= 0) & (c < SIDE)
        canvas[n, r[inside], c[inside]] = 1
        canvas[n, row : row + 8, column : column + 8] = images[which[n]]
        box[n, row : row + 8, column : column + 8] = True
    return canvas[:, None], labels[which], box


class Block(nn.Module):
    """Two convolutions beside a skip; CBAM, where there is one, gates what the convolutions add."""

    def __init__(self, before: int, width: int, stride: int, gated: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Conv2d(before, width, 1, stride=stride, bias=False)
        self.attention = sc.nn.CBAM(width, ratio=8) if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.attention(self.body(x)))


class Network(nn.Module):
    """Two blocks, a maximum over places, a linear head."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(1, 16, 2, gated), Block(16, 32, 1, gated)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.amax((-1, -2)))

    def places(self, x: Tensor) -> Iterator[Tensor]:
        """The spatial gate of each block, (B, 1, H, W)."""
        for block in self.blocks:
            yield block.attention.spatial.gate(block.attention.channel(block.body(x)))
            x = block(x)


def learned(gated: bool, steps: int, seed: int = 0) -> tuple[Network, float]:
    """A trained network and its accuracy on unseen digits."""
    torch.manual_seed(seed)
    images, labels, _ = scenes(4000, 0, unseen=False)
    model, generator = Network(gated), torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        batch = torch.randint(0, len(labels), (64,), generator=generator)
        return F.cross_entropy(model(images[batch]), labels[batch])

    train(model.parameters(), loss, steps, rate=1e-2)
    model.eval()
    images, labels, _ = scenes(1000, 1, unseen=True)
    with torch.no_grad():
        return model, float((model(images).argmax(-1) == labels).float().mean())


def test_the_spatial_gate_looks_at_the_digit() -> None:
    model, accuracy = learned(gated=True, steps=200)
    images, _, box = scenes(1000, 1, unseen=True)
    inside = F.avg_pool2d(box[:, None].float(), 2)
    area = float(inside.mean())
    with torch.no_grad():
        shares = [
            float(((m * inside).sum((1, 2, 3)) / m.sum((1, 2, 3))).mean()) for m in model.places(images)
        ]
    print(f"accuracy {accuracy:.4f}; mass in the box {shares}, area {area:.4f}")
    assert accuracy >= 0.85
    assert area == pytest.approx(64 / SIDE**2)
    assert all(share > area for share in shares)
    assert shares[0] > 1.1 * area


@pytest.mark.slow
def test_gates_cost_no_accuracy_over_five_seeds() -> None:
    gated, plain = (sum(learned(g, 300, seed)[1] for seed in range(5)) / 5 for g in (True, False))
    print(f"five seeds: CBAM {gated:.4f}, without {plain:.4f}")
    assert gated >= plain - 0.005
