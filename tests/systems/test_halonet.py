"""S274, HaloNet: blocks of queries read themselves and a halo, with learned offsets along each axis."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.errors import MechanismError
from saccade.tasks.digits import Digits
from systems.helpers import FRESH, exponent, flops, qkv, train

pytestmark = pytest.mark.system("S274")


def tables(block: int, halo: int, heads: int, dim: int) -> dict[str, Tensor]:
    reach = max(1, block + halo - 1)
    return {f"rel_axis_{a}": torch.randn(heads, 2 * reach + 1, dim, dtype=torch.float64) for a in range(2)}


def written_out(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], block: int, halo: int, table: dict[str, Tensor]
) -> Tensor:
    """Block by block: the keys of the haloed block that lie in the image, q.(k + r_dy + r_dx) / sqrt(d)."""
    height, width = grid
    out, reach = torch.zeros_like(q), table["rel_axis_0"].shape[1] // 2
    for y in range(height):
        for x in range(width):
            top, left = y // block * block, x // block * block
            near = [
                (r, c)
                for r in range(max(0, top - halo), min(height, top + block + halo))
                for c in range(max(0, left - halo), min(width, left + block + halo))
            ]
            at = [r * width + c for r, c in near]
            row = y * width + x
            for head in range(q.shape[1]):
                keys = k[:, head, at] + torch.stack(
                    [
                        table["rel_axis_0"][head, r - y + reach] + table["rel_axis_1"][head, c - x + reach]
                        for r, c in near
                    ]
                )
                s = (keys @ q[:, head, row, :, None]).squeeze(-1) / q.shape[-1] ** 0.5
                out[:, head, row] = (s.softmax(-1).unsqueeze(1) @ v[:, head, at]).squeeze(1)
    return out


@pytest.mark.parametrize("kernel", ["grid", "slab", None])
@pytest.mark.parametrize(
    ("grid", "block", "halo"), [((8, 12), 4, 2), ((7, 10), 4, 1), ((6, 6), 1, 2), ((6, 9), 3, 0)]
)
def test_every_path_equals_the_formula(
    kernel: str | None, grid: tuple[int, int], block: int, halo: int
) -> None:
    q, k, v = qkv(2, 2, grid[0] * grid[1], 8)
    params = tables(block, halo, 2, 8)
    text = f"halonet({block}, halo={halo})"
    found = sc.attend(q, k, v, text, grid=grid, params=params, kernel=kernel)
    torch.testing.assert_close(found, written_out(q, k, v, grid, block, halo, params), atol=1e-12, rtol=0)


def test_gradients_of_the_tiles_are_those_of_the_mask() -> None:
    leaves = [x.requires_grad_() for x in qkv(1, 2, 96, 8)]
    params = {n: x.requires_grad_() for n, x in tables(4, 2, 2, 8).items()}
    weight, found = torch.randn(1, 2, 96, 8, dtype=torch.float64), []
    for kernel in ("grid", "slab"):
        out = sc.attend(*leaves, "halonet(4, halo=2)", grid=(8, 12), params=params, kernel=kernel)
        found.append(torch.autograd.grad(out, [*leaves, *params.values()], weight))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [(6, 6), (5, 9)])
def test_a_halo_over_the_image_is_global_attention(grid: tuple[int, int]) -> None:
    n = grid[0] * grid[1]
    q, k, v = qkv(1, 2, n, 8)
    params = tables(3, 9, 2, 8)
    found = sc.attend(q, k, v, "halonet(3, halo=9)", grid=grid, params=params)
    whole = sc.mechanism("rel_axes(11)")
    torch.testing.assert_close(found, sc.attend(q, k, v, whole, grid=grid, params=params), atol=1e-12, rtol=0)
    zero = {name: torch.zeros_like(x) for name, x in params.items()}
    plain = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(
        sc.attend(q, k, v, "halonet(3, halo=9)", grid=grid, params=zero), plain, atol=1e-12, rtol=0
    )


def test_blocks_of_one_pixel_are_local_attention() -> None:
    q, k, v = qkv(1, 2, 70, 8)
    params = {n: torch.zeros_like(x) for n, x in tables(1, 2, 2, 8).items()}
    y, x = torch.arange(70) // 10, torch.arange(70) % 10
    near = ((y[:, None] - y).abs() <= 2) & ((x[:, None] - x).abs() <= 2)
    found = sc.attend(q, k, v, "halonet(1, halo=2)", grid=(7, 10), params=params)
    truth = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)


def test_work_is_linear_in_the_pixels() -> None:
    layer = sc.nn.Attention(32, 2, "halonet(8, halo=3)")
    sizes = (16, 32, 64)
    counted = [float(flops(lambda n=n: layer(torch.zeros(1, n * n, 32), grid=(n, n)))) for n in sizes]
    assert 0.9 < exponent([n * n for n in sizes], counted) < 1.2


def test_bad_arguments() -> None:
    for text in ("halonet(0)", "halonet(8, halo=-1)", "halonet(axes=0)"):
        with pytest.raises(MechanismError, match="must be a whole number of at least"):
            sc.mechanism(text)
    q = torch.randn(1, 2, 24, 8)
    with pytest.raises(
        MechanismError, match=r"tables for 2 axes and the grid 3; give rel_axes\(10, axes=3\)"
    ):
        sc.attend(q, q, q, "rel_axes(10)", grid=(2, 3, 4))


class Bottleneck(nn.Module):
    """A residual block 1x1, 3x3 or halo, 1x1, on images (B, C, H, W)."""

    def __init__(self, dim: int, inner: int, mechanism: str | None) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(dim, inner, 1), nn.Conv2d(inner, dim, 1)
        self.norm = nn.GroupNorm(1, dim)
        self.mix: nn.Module = (
            nn.Conv2d(inner, inner, 3, padding=1)
            if mechanism is None
            else sc.nn.Attention(inner, 2, mechanism)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.enter(self.norm(x)))
        if isinstance(self.mix, nn.Conv2d):
            y = self.mix(y)
        else:
            y = self.mix(y.flatten(2).transpose(1, 2), grid=y.shape[2:]).transpose(1, 2).view_as(y)
        return x + self.leave(F.relu(y))


def classified(mechanism: str | None, steps: int = 220, seed: int = FRESH) -> tuple[float, int]:
    """Test accuracy on digits after a short training, and the number of parameters."""
    torch.manual_seed(seed)
    digits, generator = Digits(seed=seed), torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        *(Bottleneck(32, 32, mechanism) for _ in range(2)),
        nn.GroupNorm(1, 32),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )

    def loss(step: int) -> Tensor:
        images, labels = digits.batch(64, generator)
        return F.cross_entropy(model(images), labels)

    train(model.parameters(), loss, steps, rate=6e-3)
    images, labels = digits.test
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    return accuracy, sum(p.numel() for p in model.parameters())


def test_digits_are_read_with_fewer_parameters_than_convolutions_need() -> None:
    pytest.importorskip("sklearn")
    halo, parameters = classified("halonet(4, halo=1)")
    convolution, most = classified(None)
    assert halo >= 0.93
    assert halo >= convolution - 0.05
    assert parameters < most
