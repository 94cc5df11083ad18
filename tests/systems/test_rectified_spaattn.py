"""S289, Rectified SpaAttn: block-sparse attention scaled by the mass it stands for, other blocks as means."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.selection import Blocks
from saccade.systems.rectified import Rectification
from systems.helpers import dense, flops, qkv

pytestmark = pytest.mark.system("S289")


def even(noise: float, blocks: int = 16, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys that are alike inside their block but for noise, and any values: (1, 2, n, 16)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 2, blocks * size, 16)
    q, k, v, dq, dk = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5))
    q, k = (x[:, :, :blocks].repeat_interleave(size, 2) for x in (q, k))
    return q + noise * dq, k + noise * dk, v


CHOICE = "top_blocks(16, top=4, rows=16)"


def test_even_blocks_give_full_attention() -> None:
    q, k, v = even(0.0)
    full = dense(q, k, v)
    found = sc.attend(q, k, v, f"rectified_spaattn({CHOICE})")
    assert (found - full).abs().max() < 2e-15
    assert (sc.attend(q, k, v, CHOICE) - full).abs().max() > 0.15


def error(noise: float, text: str) -> float:
    """Mean squared error against full attention over four draws."""
    total = 0.0
    for seed in range(4):
        q, k, v = even(noise, seed=seed)
        total += float((sc.attend(q, k, v, text) - dense(q, k, v)).square().mean()) / 4
    return total


@pytest.mark.parametrize(("noise", "left"), [(0.1, 0.3), (0.3, 0.5)])
def test_the_correction_removes_most_of_the_error(noise: float, left: float) -> None:
    assert error(noise, f"rectified_spaattn({CHOICE})") <= left * error(noise, CHOICE)


def test_uneven_blocks_gain_less() -> None:
    fixed, plain = error(1.0, f"rectified_spaattn({CHOICE})"), error(1.0, CHOICE)
    assert 0.5 * plain < fixed < plain


def written_out(q: Tensor, k: Tensor, v: Tensor, block: int, top: int, rows: int, text: int) -> Tensor:
    """The formula, one query at a time; the first `text` keys are no blocks."""
    out = torch.zeros_like(q)
    scale, n = q.shape[-1] ** -0.5, k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            tiles = [range(at, min(n, at + block)) for at in range(text, n, block)]
            for first in range(0, q.shape[2], rows):
                own = q[b, h, first : first + rows]
                qm, qd = own.mean(0), (own - own.mean(0)).abs().mean(0)
                scores, accept, mass = [], [], []
                for tile in tiles:
                    ks = k[b, g, list(tile)]
                    km, kd = ks.mean(0), (ks - ks.mean(0)).abs().mean(0)
                    scores.append(float(qm @ km * scale))
                    mass.append(len(tile) * torch.exp(qm @ km * scale))
                    accept.append(float((qm @ km).abs()) > float((qd @ km).abs() + (qm @ kd).abs()))
                single = [torch.exp(qm @ k[b, g, t] * scale) for t in range(text)]
                total = sum(mass) + sum(single)
                # equal counts but for the last block: its keys weigh in the choice as well
                ranked = sorted(range(len(tiles)), key=lambda u: -float(mass[u]))
                critical = ranked[:top]
                taken = [u for u in range(len(tiles)) if accept[u] and u not in critical]
                rest = 1 - sum(mass[u] for u in taken) / total
                keys = [*range(text), *(j for u in sorted(critical) for j in tiles[u])]
                for i in range(first, min(first + rows, q.shape[2])):
                    w = (k[b, g, keys] @ q[b, h, i] * scale).softmax(0)
                    pooled = sum(mass[u] / total * v[b, g, list(tiles[u])].mean(0) for u in taken)
                    out[b, h, i] = rest * (w @ v[b, g, keys]) + pooled
    return out


@pytest.mark.parametrize(("rows", "text", "length"), [(4, 0, 24), (1, 0, 22), (4, 8, 30), (2, 4, 24)])
def test_the_formula_and_its_gradients(rows: int, text: int, length: int) -> None:
    q, k, v = qkv(1, 4, length, 8, kv=2)
    k = k[:, :, ::4].repeat_interleave(4, 2)[:, :, :length] + 0.2 * k  # so that some blocks are accepted
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    name = f"rectified_spaattn(top_blocks(4, top=2, rows={rows}), text_keys={text})"
    found = sc.attend(q, k, v, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of floats taken from tensors with gradients
        wanted = written_out(q, k, v, 4, 2, rows, text)
    chosen = sc.attend(q, k, v, name, need=("selection",)).selection
    assert isinstance(chosen, Rectification)
    assert 0.1 < chosen.accepted.float().mean() < 0.8
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_all_blocks_are_full_attention() -> None:
    q, k, v = qkv(2, 4, 45, 8, kv=2)
    for rows in (1, 5):
        found = sc.attend(q, k, v, f"rectified_spaattn(top_blocks(5, top=40, rows={rows}), text_keys=10)")
        torch.testing.assert_close(found, dense(q, k, v), atol=1e-12, rtol=0)


@pytest.mark.parametrize("choice", ["proxy=block_mass", "proxy=bound_key", "proxy=pooled_gate(4)"])
def test_any_choice_can_be_wrapped(choice: str) -> None:
    q, k, v = even(0.1)
    m = sc.mechanism(f"rectified_spaattn(top_blocks(16, top=4, rows=16, {choice}))")
    plain = sc.mechanism(f"top_blocks(16, top=4, rows=16, {choice})")
    sizes = sc.parts.base.Sizes(2, 2, 16, 16)
    assert m.weights(sizes) == plain.weights(sizes)
    params = {n: 0 * w.make().double() for n, w in m.weights(sizes).items()}
    read = sc.attend(q, k, v, plain, params=params, need=("selection",)).selection
    found = sc.attend(q, k, v, m, params=params, need=("selection",))
    assert torch.equal(found.selection.index.sort(-1).values, read.index.sort(-1).values)
    rest = sc.attend(q, k, v, plain, params=params)
    if "mass" in choice:  # its own estimate of the mass is the truth, so the correction is right
        full = dense(q, k, v)
        assert (found.out - full).square().mean() < 0.3 * (rest - full).square().mean()


def test_a_choice_made_elsewhere_is_corrected() -> None:
    q, k, v = even(0.0)
    given = torch.arange(4).expand(1, 2, 16, 4)
    blocks = Blocks(given, torch.ones_like(given, dtype=torch.bool), 16, 16)
    text = f"rectified_spaattn({CHOICE})"
    torch.testing.assert_close(sc.attend(q, k, v, text, selection=blocks), dense(q, k, v), atol=1e-12, rtol=0)
    first = sc.attend(q, k, v, text, need=("selection",))
    again = sc.attend(q, k, v, text, selection=first.selection, need=("selection",))
    assert again.selection is first.selection
    assert torch.equal(first.out, again.out)


def test_a_budget_of_mass_reads_fewer_blocks_where_attention_is_sharp() -> None:
    q, k, v = even(0.0)
    text = "rectified_spaattn(top_blocks(16, mass(0.8, least=2), rows=16))"
    flat, sharp = (sc.attend(s * q, k, v, text, need=("selection",)).selection for s in (0.1, 4.0))
    assert sharp.valid.sum() < 0.4 * flat.valid.sum()
    assert int(sharp.valid.sum(-1).min()) >= 2
    assert sharp.index.shape[-1] < flat.index.shape[-1]


def test_work_follows_the_blocks_read() -> None:
    q, k, v = qkv(1, 2, 2048, 32, dtype=torch.float32)
    counted = flops(lambda: sc.attend(q, k, v, "rectified_spaattn(top_blocks(64, share(0.125), rows=64))"))
    assert counted < 0.15 * 2048 * 2048 * 32 * 2 * 2 * 2


def test_bad_arguments() -> None:
    with pytest.raises(sc.MechanismError, match="text_keys must be whole blocks of 16, got 8"):
        sc.mechanism("rectified_spaattn(top_blocks(16), text_keys=8)")
    with pytest.raises(sc.MechanismError, match="choice must be a top_blocks"):
        sc.mechanism("rectified_spaattn(window(8))")
    with pytest.raises(sc.NotSupported, match="causal form"):
        sc.causal(sc.mechanism("rectified_spaattn"))
