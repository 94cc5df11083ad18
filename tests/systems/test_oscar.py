"""OSCAR: a rotation from the queries' covariance before keys and values are packed to two bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.cache import Bases, LayerCache, Oscar, Packed, policy
from saccade.cache.bases import bit_reversed, covariance, hadamard, random_rotation, rotated, spectral
from saccade.cache.packed import pack, unpack

pytestmark = pytest.mark.system("S278")


def texts(n: int = 600, d: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, n, d, generator=generator)
    k, v = (torch.randn(2, 2, n, d, generator=generator) for _ in range(2))
    return q, k, v


def planted(seed: int, n: int = 1024, d: int = 64) -> tuple[Tensor, Tensor]:
    """Queries and keys (n, d) with one eigenbasis and opposed spectra, from 1 to 10^-3.5."""
    generator = torch.Generator().manual_seed(seed)
    basis = random_rotation(d, seed + 100).float()
    spectrum = torch.logspace(0, -3.5, d).sqrt()
    q, k = (torch.randn(n, d, generator=generator) for _ in range(2))
    return q * spectrum @ basis.T, k * spectrum.flip(0) @ basis.T


def outliers(seed: int, n: int = 1024, d: int = 64) -> tuple[Tensor, Tensor]:
    """Queries without structure, and keys with four channels that are ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, d, generator=generator) for _ in range(2))
    k[:, torch.randperm(d, generator=generator)[:4]] *= 10
    return q, k


def error(q: Tensor, k: Tensor, basis: Tensor) -> float:
    """Mean squared error of logits with keys of two bits in groups of 32 channels."""
    inside = k @ basis
    return float(((q @ basis @ (inside - Packed.of(inside, 2, 32).numbers(k.dtype)).T) ** 2).mean())


@pytest.mark.parametrize("d", [12, 64, 80, 128])
def test_rotations_leave_logits_as_they_are(d: int) -> None:
    q, k, _ = texts(40, d)
    there = torch.ones(2, 2, 40, dtype=torch.bool)
    rotations = [hadamard(d)[None], random_rotation(d, 3)[None], spectral(covariance(q, there))]
    want = q.view(2, 2, 2, 40, d) @ k.unsqueeze(2).mT
    for basis in (r.float() for r in rotations):
        torch.testing.assert_close(basis @ basis.mT, torch.eye(d).expand_as(basis), atol=1e-5, rtol=0)
        a = rotated(q.reshape(4, 2, 40, d), basis).view(2, 2, 2, 40, d)
        b = rotated(k.flatten(0, 1), basis).view(2, 2, 1, 40, d)
        assert ((a @ b.mT - want).abs().max() / want.abs().max()) < 1e-5


def test_hadamard_and_bit_reversal_by_hand() -> None:
    assert bit_reversed(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert bit_reversed(12).tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
    made = hadamard(8)
    for i in range(8):
        for j in range(8):
            assert float(made[i, j]) == pytest.approx((-1) ** bin(i & j).count("1") / 8**0.5)


def test_covariance_by_hand_without_padding() -> None:
    q, _, _ = texts(10, 4)
    there = torch.ones(2, 2, 10, dtype=torch.bool)
    there[0, :, :6] = False
    got = covariance(q.masked_fill(~there.repeat_interleave(2, 1)[..., None], torch.nan), there)
    for g in range(2):
        total, count = torch.zeros(4, 4, dtype=torch.float64), 0
        for b in range(2):
            for h in (2 * g, 2 * g + 1):
                for i in range(6 if b == 0 else 0, 10):
                    total += torch.outer(q[b, h, i], q[b, h, i]).double()
                    count += 1
        torch.testing.assert_close(got[g], total / count)


def test_four_codes_a_byte_come_back() -> None:
    codes = torch.randint(0, 4, (7, 128), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert pack(codes, 2).shape == (7, 32)
    assert torch.equal(unpack(pack(codes, 2), 2), codes)


def test_segments_merge_to_one_softmax() -> None:
    """Sinks, packed keys and the recent ones together are one softmax over them."""
    q, k, v = (x.double() for x in texts())
    cache = LayerCache(policy("oscar"), every=1000)
    cache.append(k[:, :, :590], v[:, :, :590])
    cache.compress(q[:, :, :590])
    cache.append(k[:, :, 590:], v[:, :, 590:])
    got = cache.attend(q[:, :, 590:])
    assert cache.packed is not None
    assert cache.kept is not None
    assert cache.packed.counts == ((590 - 64 - 256) // 32 * 32,) * 4
    held_k, held_v, _, _ = cache._held()
    torch.testing.assert_close(got, sc.attend(q[:, :, 590:], held_k, held_v, "causal"), atol=1e-6, rtol=1e-6)
    for x, held in ((k, held_k), (v, held_v)):
        assert torch.equal(held[:, :, :64], x[:, :, :64])
        assert torch.equal(held[:, :, -256:], x[:, :, -256:])
        assert (held[:, :, 64:320] - x[:, :, 64:320]).abs().max() > 0.1


def test_bits_a_number() -> None:
    """2.25 bits a packed number at head_dim 128, and 2.28 with sinks and recent tokens in a long text."""
    n, d = 65536, 128
    k, v = (torch.randn(1, 1, n, d, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    cache = LayerCache(policy("oscar(rotation='none')"))
    cache.append(k, v)
    cache.compress(k)
    assert cache.packed is not None
    packed = cache.packed.counts[0] * 2 * d
    assert (cache.packed.keys.nbytes + cache.packed.values.nbytes) * 8 == 2.25 * packed
    bits = cache.nbytes * 8 / (n * 2 * d)
    assert 2.25 < bits < 2.33
    assert bits / 16 < 0.16


@pytest.mark.parametrize("seed", range(3))
def test_opposed_spectra_are_quantised_better_than_by_hadamard(seed: int) -> None:
    q, k = planted(seed)
    half = len(q) // 2
    basis = spectral(covariance(q[None, None, :half], torch.ones(1, 1, half, dtype=torch.bool)))[0].float()
    plain = error(q[half:], k[half:], hadamard(64).float())
    assert error(q[half:], k[half:], basis) <= 0.6 * plain


@pytest.mark.parametrize("seed", range(3))
def test_on_outlier_channels_hadamard_alone_does_better_than_nothing(seed: int) -> None:
    """No win of the spectral basis is asserted here: queries have no covariance that it could use."""
    q, k = outliers(seed)
    assert error(q, k, hadamard(64).float()) < 0.6 * error(q, k, torch.eye(64))


def test_a_layer_finds_its_bases_and_reads_better_with_them() -> None:
    """Through the cache: a planted head, logits of keys in the layer's own basis against Hadamard's."""
    q, k = (x[None, None] for x in planted(5))
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(9))
    errors = {}
    for rotation in ("spectral", "hadamard"):
        cache = LayerCache(Oscar(group=32, sink=0, residual=0, rotation=rotation))
        cache.append(k, v)
        cache.compress(q)
        held = cache._held()[0]
        errors[rotation] = float(((q @ (k - held).mT) ** 2).mean())
    assert errors["spectral"] <= 0.6 * errors["hadamard"]


def test_clipping_bounds_what_is_stored() -> None:
    q, k, v = texts(200)
    k = k.clone()
    k[:, :, 50] *= 20
    cache = LayerCache(Oscar(bits=8, residual=0, sink=0, clip=0.99))
    cache.append(k, v)
    cache.compress(q)
    assert cache.bases is not None
    assert cache.bases.tau_k is not None
    assert cache.packed is not None
    stored = cache.packed.keys.numbers(torch.float32).unflatten(0, (2, 2, -1))
    tau = cache.bases.tau_k.view(1, 2, 1, 1, 1)
    assert (stored.abs() <= tau * 1.01).all()
    share = (
        rotated(k.flatten(0, 1), cache.bases.k).view_as(k).abs() <= cache.bases.tau_k.view(1, 2, 1, 1)
    ).float()
    assert share.mean() == pytest.approx(0.99, abs=1e-3)


def test_bases_that_are_given_are_used_and_counted_by_layer() -> None:
    q, k, v = texts(100)
    given = tuple(Bases(*(random_rotation(64, s).float()[None] for s in (n, n + 1))) for n in range(2))
    rule = Oscar(residual=0, sink=0, offline=given)
    cache = LayerCache(rule, layer=1, layers=2)
    cache.append(k, v)
    cache.compress(q)
    assert cache.bases is given[1]
    other = LayerCache(rule, layer=0, layers=3)
    other.append(k, v)
    with pytest.raises(sc.MechanismError, match="one a layer"):
        other.compress(q)
