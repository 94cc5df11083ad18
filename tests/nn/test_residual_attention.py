"""The mask that goes down and up, and the rule (1 + M) T."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.residual_attention import ResidualUnit


def pooled(x: Tensor) -> Tensor:
    """The maximum over 3x3 windows, two places apart, by loops: (C, H, W)."""
    c, h, w = x.shape
    out = torch.empty(c, (h + 1) // 2, (w + 1) // 2, dtype=x.dtype)
    for r in range(out.shape[1]):
        for s in range(out.shape[2]):
            out[:, r, s] = x[:, max(0, 2 * r - 1) : 2 * r + 2, max(0, 2 * s - 1) : 2 * s + 2].amax((-1, -2))
    return out


def stretched(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation between places' middles, by loops: (C, H, W) to (C, *size)."""
    c, h, w = x.shape
    out = torch.zeros(c, *size, dtype=x.dtype)
    for r in range(size[0]):
        for s in range(size[1]):
            down = max(0.0, (r + 0.5) * h / size[0] - 0.5)
            right = max(0.0, (s + 0.5) * w / size[1] - 0.5)
            i, j, a, b = int(down), int(right), down % 1, right % 1
            k, m = min(i + 1, h - 1), min(j + 1, w - 1)
            above = (1 - b) * x[:, i, j] + b * x[:, i, m]
            out[:, r, s] = (1 - a) * above + a * ((1 - b) * x[:, k, j] + b * x[:, k, m])
    return out


@pytest.mark.parametrize("size", [(8, 8), (5, 6)])
def test_the_way_down_and_up_is_written_out(size: tuple[int, int]) -> None:
    mask = sc.nn.UpDownMask(3, downs=2).double().eval()
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    small = mask.down[0](pooled(x[0])[None])
    least = mask.down[1](pooled(small[0])[None])
    up = stretched(mask.up[0](least)[0], tuple(small.shape[-2:]))[None] + mask.skip[0](small)
    full = stretched(mask.up[1](up)[0], size)[None]
    torch.testing.assert_close(mask(x), torch.sigmoid(mask.close(full)))


def test_a_unit_adds_two_convolutions_of_what_is_normed_and_rectified() -> None:
    unit = ResidualUnit(3).eval()
    x = torch.randn(2, 3, 5, 5)
    first, second = (unit[n].weight for n in (2, 5))
    inner = F.conv2d(F.relu(x / (1 + 1e-5) ** 0.5), first, padding=1)
    torch.testing.assert_close(unit(x), x + F.conv2d(F.relu(inner / (1 + 1e-5) ** 0.5), second, padding=1))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3)])
@pytest.mark.parametrize("downs", [1, 3])
def test_the_mask_has_the_shape_of_its_map(size: tuple[int, int], downs: int) -> None:
    mask = sc.nn.UpDownMask(4, downs).eval()
    found = mask(torch.randn(2, 4, *size))
    assert found.shape == (2, 4, *size)
    assert float(found.detach().min()) > 0
    assert float(found.detach().max()) < 1


def test_endings() -> None:
    x = torch.randn(2, 4, 5, 5)
    masks = {end: sc.nn.UpDownMask(4, ending=end).eval() for end in ("mixed", "channel", "spatial")}
    for mask in masks.values():
        mask.load_state_dict(masks["mixed"].state_dict())
    s = torch.logit(masks["mixed"](x))
    norms = (s / masks["channel"](x)).amax(1)
    torch.testing.assert_close(masks["channel"](x).square().sum(1), torch.ones(2, 5, 5))
    torch.testing.assert_close(norms, s.square().sum(1).sqrt(), rtol=1e-3, atol=1e-4)
    flat = s.flatten(2)
    standard = (flat - flat.mean(-1, keepdim=True)) / (
        flat.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(masks["spatial"](x).flatten(2), standard.sigmoid(), rtol=1e-3, atol=1e-4)


def test_a_mask_learns_by_its_gradient() -> None:
    block = sc.nn.ResidualAttention(nn.Conv2d(2, 2, 3, padding=1), sc.nn.UpDownMask(2)).double().eval()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))
    block(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


def test_a_stage_halves_the_map_and_widens_it() -> None:
    model = sc.nn.ResidualAttentionNetwork(classes=5, widths=(4, 8, 16), image_channels=2).eval()
    x = torch.randn(3, 2, 11, 16)
    assert model.body(x).shape == (3, 16, 3, 4)
    assert model(x).shape == (3, 5)
    assert [len(m.down) for m in model.modules() if isinstance(m, sc.nn.UpDownMask)] == [3, 2, 1]
    plain = sc.nn.ResidualAttentionNetwork(classes=5, masked=False)
    assert not any(isinstance(m, sc.nn.UpDownMask) for m in plain.modules())


def test_what_is_no_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="downs and units must be at least 1, got downs=0 and units=1"):
        sc.nn.UpDownMask(4, downs=0)
    with pytest.raises(ValueError, match="ending must be one of mixed, channel, spatial, got 'soft'"):
        sc.nn.UpDownMask(4, ending="soft")
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 4\)"):
        sc.nn.UpDownMask(4)(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="without places"):
        sc.nn.UpDownMask(4)(torch.zeros(2, 4, 0, 4))
