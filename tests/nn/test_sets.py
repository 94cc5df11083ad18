"""Blocks on sets against loops over heads and elements; order, padding, and sets of one element or none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import saccade as sc

DIM, HEADS = 8, 2


def reads(layer: sc.nn.Attention, x: Tensor, y: Tensor) -> Tensor:
    """Multi-head attention of x (n, dim) over y (m, dim), by loops."""
    q, k, v = (p.weight for p in (layer.query_proj, layer.key_proj, layer.value_proj))
    width = DIM // HEADS
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(HEADS):
            own = slice(h * width, (h + 1) * width)
            s = [((q[own] @ x[i]) @ (k[own] @ y[j])).item() / math.sqrt(width) for j in range(len(y))]
            total = sum(math.exp(a) for a in s)
            heads.append(
                sum((math.exp(a) / total * (v[own] @ y[j]) for j, a in enumerate(s)), x.new_zeros(width))
            )
        rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


def block(layer: sc.nn.MAB, x: Tensor, y: Tensor) -> Tensor:
    """LN(h + rFF(h)), h = LN(x + attention), of sets without a batch."""
    h = layer.norm1(x + reads(layer.attention, x, y))
    return layer.norm2(h + layer.feed_forward(h))


@pytest.mark.parametrize("norm", [True, False])
def test_blocks_are_written_out(norm: bool) -> None:
    x, y = torch.randn(5, DIM, dtype=torch.float64), torch.randn(3, DIM, dtype=torch.float64)
    mab = sc.nn.MAB(DIM, HEADS, norm=norm).double()
    torch.testing.assert_close(mab(x[None], y[None])[0], block(mab, x, y))
    sab = sc.nn.SAB(DIM, HEADS, norm=norm).double()
    torch.testing.assert_close(sab(x[None])[0], block(sab.block, x, x))
    isab = sc.nn.ISAB(DIM, HEADS, 3, norm=norm).double()
    inner = block(isab.read, isab.points, x)
    torch.testing.assert_close(isab(x[None])[0], block(isab.write, x, inner))
    pma = sc.nn.PMA(DIM, HEADS, 2, norm=norm).double()
    torch.testing.assert_close(pma(x[None])[0], block(pma.block, pma.seeds, pma.feed_forward(x)))


def test_gradients_by_differences() -> None:
    x = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    for layer in (sc.nn.SAB(DIM, HEADS), sc.nn.ISAB(DIM, HEADS, 2), sc.nn.PMA(DIM, HEADS, 2)):
        assert torch.autograd.gradcheck(layer.double(), (x, mask))


LAYERS = {
    "sab": lambda: sc.nn.SAB(DIM, HEADS),
    "isab": lambda: sc.nn.ISAB(DIM, HEADS, 3),
    "isab of as many points": lambda: sc.nn.ISAB(DIM, HEADS, 7),
    "pma": lambda: sc.nn.PMA(DIM, HEADS, 2),
    "pma of as many seeds": lambda: sc.nn.PMA(DIM, HEADS, 7),
}


@pytest.mark.parametrize("name", LAYERS)
def test_padding_reaches_no_result(name: str) -> None:
    layer = LAYERS[name]().double()
    x = torch.randn(3, 7, DIM, dtype=torch.float64)
    mask = torch.rand(3, 7) < 0.6
    mask[0, 0], mask[2] = True, True
    found = layer(x.masked_fill(~mask[..., None], math.nan), mask)
    for n in range(3):
        alone = layer(x[n, mask[n]][None])[0]
        torch.testing.assert_close(found[n] if name.startswith("pma") else found[n, mask[n]], alone)
    if not name.startswith("pma"):
        assert not found[~mask].any()


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_set_and_a_set_of_one(name: str) -> None:
    layer = LAYERS[name]().double()
    x = torch.randn(2, 4, DIM, dtype=torch.float64, requires_grad=True)
    nothing = layer(x[:, :0])
    padded = layer(x, torch.zeros(2, 4, dtype=torch.bool))
    if name.startswith("pma"):
        h = layer.block.norm1(layer.seeds)
        torch.testing.assert_close(
            nothing, layer.block.norm2(h + layer.block.feed_forward(h)).expand(2, -1, -1)
        )
        torch.testing.assert_close(padded, nothing)
    else:
        assert nothing.shape == (2, 0, DIM)
        assert not padded.any()
    padded.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    one = torch.arange(4) == 2
    alone, among = layer(x[:, 2:3]), layer(x, one.expand(2, 4))
    torch.testing.assert_close(among if name.startswith("pma") else among[:, 2:3], alone)


def test_one_element_reads_itself_whole() -> None:
    layer = sc.nn.SAB(DIM, HEADS, norm=False).double()
    x = torch.randn(2, 1, DIM, dtype=torch.float64)
    attention = layer.block.attention
    h = x + attention.out_proj(attention.value_proj(x))
    torch.testing.assert_close(layer(x), h + layer.block.feed_forward(h))


def test_a_set_transformer_takes_an_empty_set() -> None:
    model = sc.nn.SetTransformer(3, 5, outputs=2, dim=DIM, heads=HEADS, inducing=4).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[False] * 4, [True] * 4])
    found = model(x, mask)
    torch.testing.assert_close(found[:1], model(x[:1, :0]))
    torch.testing.assert_close(found[1:], model(x[1:]))
    assert model.encode(x, mask).shape == (2, 4, DIM)
    assert any(isinstance(m, nn.LayerNorm) for m in model.modules())


def test_what_is_no_set_is_refused() -> None:
    layer = sc.nn.SAB(DIM, HEADS)
    with pytest.raises(ValueError, match=r"must be \(batch, elements, dim\), got shape \(5, 8\)"):
        layer(torch.zeros(5, DIM))
    with pytest.raises(ValueError, match=r"mask must be boolean \(2, 5\), .* got torch.int64 \(2, 5\)"):
        layer(torch.zeros(2, 5, DIM), torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got torch.bool \(5,\)"):
        layer(torch.zeros(2, 5, DIM), torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one inducing point, got inducing=0"):
        sc.nn.ISAB(DIM, HEADS, 0)
    with pytest.raises(ValueError, match="at least one seed, got seeds=0"):
        sc.nn.PMA(DIM, HEADS, 0)
