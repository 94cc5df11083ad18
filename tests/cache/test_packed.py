"""Packed integers: exact codes, a bound of the error, bytes by formula, and caches that hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import saccade as sc
from cache.test_layer import B, G, qkv, run
from saccade.cache import (
    Format,
    Full,
    Kivi,
    LayerCache,
    Packed,
    PackedSegments,
    Stored,
    evict,
    layer_cache,
    policy,
)
from saccade.cache.packed import pack, unpack
from saccade.errors import MechanismError

BITS = (2, 4, 8)


def numbers(*shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back_exactly(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 3, 32), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    made = pack(codes, bits)
    assert made.shape == (5, 3, 32 * bits // 8)
    assert torch.equal(unpack(made, bits), codes)
    data = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(pack(unpack(data, bits), bits), data)
    first = sum(int(codes[0, 0, n]) << (bits * n) for n in range(8 // bits))
    assert int(made[0, 0, 0]) == first


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [0.0, 3.0, -100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_codes_are_the_nearest_and_errors_bounded(bits: int, offset: float, dtype: torch.dtype) -> None:
    x = numbers(4, 32, seed=bits, offset=offset).to(dtype)
    made = Packed.of(x, bits, 16)
    got = made.numbers(torch.float64)
    codes = unpack(made.codes, bits).flatten(-2)
    most = 2**bits - 1
    for row in range(4):
        for group in range(2):
            part = [float(t) for t in x[row, 16 * group : 16 * group + 16]]
            zero, scale = float(made.zero[row, group]), float(made.scale[row, group])
            low, high = min(part), max(part)
            assert zero <= low
            assert zero >= low - abs(low) * 2**-7
            assert zero + most * scale >= high - 1e-6 * abs(high)
            assert scale <= (high - zero) / most * (1 + 2**-7)
            for n, number in enumerate(part):
                at = 16 * group + n
                error = [abs(number - (zero + c * scale)) for c in range(most + 1)]
                assert error[int(codes[row, at])] <= min(error) + 1e-5 * abs(number)
                assert abs(float(got[row, at]) - number) <= scale / 2 + 1e-5 * abs(number)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_second_packing_changes_nothing(bits: int) -> None:
    once = Packed.of(numbers(20, 64), bits, 32)
    twice = Packed.of(once.numbers(torch.float32), bits, 32)
    where = once.numbers(torch.float32).unflatten(-1, (-1, 32)).amin(-1) == once.zero.float()
    full = unpack(once.codes, bits).amax(-1) == 2**bits - 1
    kept = where & full & (twice.scale == once.scale)
    assert kept.float().mean() > 0.9
    assert torch.equal(twice.codes[kept], once.codes[kept])


def test_groups_of_one_number_are_exact() -> None:
    same = torch.full((2, 16), 1.5)
    assert torch.equal(Packed.of(same, 2, 8).numbers(torch.float32), same)
    assert Packed.of(numbers(0, 16), 4, 8).numbers(torch.float32).shape == (0, 16)


@pytest.mark.parametrize(
    ("bits", "group", "says"), [(3, 8, "bits is"), (2, 6, "whole bytes"), (8, 5, "whole bytes")]
)
def test_what_does_not_fill_bytes_is_refused(bits: int, group: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Packed.of(numbers(2, 32), bits, group)


def formula(n: int, d: int, e: int, bits: int, group: int) -> int:
    """Bytes of n packed tokens of a head: codes, and a scale and a zero of two bytes a group."""
    return n * (d + e) * bits // 8 + 4 * (n // group * d + n * (e // group))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_bytes_are_those_of_the_formula(bits: int, group: int) -> None:
    n, d = 512, 128
    k, v = (numbers(1, 2, n, d, seed=s).bfloat16() for s in (0, 1))
    cache = LayerCache(Kivi(bits, group, residual=0))
    cache.append(k, v)
    cache.compress(k)
    assert cache.packed is not None
    want = 2 * formula(n, d, d, bits, group)
    assert cache.packed.keys.nbytes + cache.packed.values.nbytes == want
    assert want == 2 * n * 2 * d * (bits + 32 / group) / 8
    assert cache.packed.nbytes == want + 2 * 4  # and the first position of each row
    assert cache.nbytes == cache.packed.nbytes


def test_two_bits_take_at_most_016_of_bfloat16() -> None:
    n, d = 32768, 128
    k, v = (numbers(1, 1, n, d, seed=s).bfloat16() for s in (0, 1))
    cache = LayerCache(policy("kivi(bits=2)"))
    cache.append(k, v)
    cache.compress(k)
    held = [cache.keys, cache.values]
    assert cache.packed is not None
    assert cache.kept is not None
    held += [cache.kept.keys, cache.kept.values, cache.kept.positions, cache.packed.positions]
    held += [x for p in (cache.packed.keys, cache.packed.values) for x in (p.codes, p.scale, p.zero)]
    storage = sum(x.untyped_storage().nbytes() for x in held if x is not None)
    assert storage == cache.nbytes
    assert cache.nbytes <= 0.16 * n * 2 * d * 2
    assert formula(n, d, d, 2, 64) == 0.15625 * n * 2 * d * 2


CUTS = [[60], [17, 1, 1, 1, 1, 39], [20] * 3, [40, *[1] * 20]]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(
    "text", ["kivi(bits=8, group=8, residual=8)", "kivi(bits=8, group=8, residual=5, sink=3)"]
)
def test_eight_bits_are_close_to_full_attention(text: str, cuts: list[int]) -> None:
    q, k, v = qkv(60)
    cache = LayerCache(policy(text), every=4)
    torch.testing.assert_close(run(cache, q, k, v, cuts), sc.attend(q, k, v, "causal"), atol=0.03, rtol=0.03)
    assert cache.counts == (60,) * (B * G)
    assert cache.packed is not None
    packed = cache.packed.counts[0]
    sink, residual = (3, 5) if "sink" in text else (0, 8)
    assert packed >= (60 - 4 - sink - residual) // 8 * 8
    k_held, v_held, positions, there = cache._held()
    assert there.all()
    assert torch.equal(positions, torch.arange(60).expand_as(positions))
    for x, held in ((k, k_held), (v, v_held)):
        assert (x - held).abs().max() <= 8 / 255 / 2 * 1.05  # no range of these numbers is above 8
        plain = (x == held).all(-1).all(1).all(0)
        assert plain[:sink].all()
        assert plain[60 - residual :].all()


def test_reading_is_softmax_over_the_unpacked_keys() -> None:
    q, k, v = (x.double() for x in qkv(70))
    cache = LayerCache(policy("kivi(bits=2, group=8, residual=10)"), every=100)
    got = run(cache, q, k, v, [65, *[1] * 5])[:, :, 65:]
    k_held, v_held, _, _ = cache._held()
    want = sc.attend(q[:, :, 65:], k_held, v_held, "causal")
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    assert (k_held[:, :, :40] - k[:, :, :40]).abs().max() > 0.1


def test_error_falls_with_bits_and_small_groups() -> None:
    q, k, v = qkv(200)
    want = sc.attend(q[:, :, -1:], k, v, "full")

    def error(made: Format) -> float:
        cache = LayerCache(made)
        cache.append(k, v)
        cache.compress(q)
        cache.append(k[:, :, :0], v[:, :, :0])
        assert cache.packed is not None
        assert cache.kept is not None
        far = [x.read(q[:, :, -1:]) for x in (cache.packed, cache.kept)]
        return float((sc.merge([p for p in far if p is not None])[0] - want).norm() / want.norm())

    errors = [error(Kivi(bits, 32, residual=8)) for bits in (2, 4, 8)]
    assert errors[0] > 2.5 * errors[1]
    assert errors[1] > 8 * errors[2]
    assert errors[2] < 0.01
    assert error(Kivi(2, 64, residual=8)) > error(Kivi(2, 8, residual=8))


@pytest.mark.parametrize("bits", BITS)
def test_logits_are_off_by_no_more_than_half_a_scale_each_channel(bits: int) -> None:
    q, k, v = (x.double() for x in qkv(64))
    cache = LayerCache(Kivi(bits, 16, residual=0))
    cache.append(k, v)
    cache.compress(q)
    assert cache.packed is not None
    held = cache._held()[0]
    scale = cache.packed.keys.scale.double().view(B, G, 4, -1).repeat_interleave(16, 2)
    rows = q.unflatten(1, (G, -1))
    off = (rows @ (held - k).unsqueeze(2).mT).abs()
    assert (off <= rows.abs() @ (scale / 2).unsqueeze(2).mT + 1e-6).all()
    values = cache.packed.values.scale.double().view(B, G, 64, 1)
    assert ((cache._held()[1] - v).abs() <= values / 2 + 1e-6).all()


@pytest.mark.parametrize("text", ["snapkv(keep=32) | full", "h2o(keep=32) | full", "full | h2o(keep=60)"])
def test_phases_with_a_format(text: str) -> None:
    q, k, v = qkv(90)
    plain = LayerCache(policy(text), every=8)
    packed = LayerCache(policy(f"({text}) + kivi(bits=8, group=8, residual=8)"), every=8)
    want, got = (run(cache, q, k, v, [60, *[1] * 30]) for cache in (plain, packed))
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    assert packed.counts == plain.counts
    assert packed.packed is not None
    assert min(packed.packed.counts) >= 24


def test_what_is_packed_stays_as_it_is_while_tokens_come() -> None:
    q, k, v = qkv(100)
    cache = LayerCache(policy("kivi(bits=2, group=8, residual=8)"), every=4)
    run(cache, *(x[:, :, :60] for x in (q, k, v)), [60])
    assert cache.packed is not None
    before = cache.packed
    run(cache, *(x[:, :, 60:] for x in (q, k, v)), [1] * 40)
    after = cache.packed
    assert after.counts[0] > before.counts[0]
    whole = after.keys.codes.unflatten(0, (B * G, -1))[:, : before.blocks[0]].flatten(0, 1)
    assert torch.equal(whole, before.keys.codes)
    assert after.positions.shape == (B * G,)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "h2o", "tova", "streaming_llm", "l2_norm"])
@pytest.mark.parametrize("cuts", [[90], [70, *[1] * 20]])
def test_what_a_policy_keeps_is_packed(name: str, cuts: list[int]) -> None:
    """Choices are those of the plain policy after one text, and outputs of eight bits close to its own."""
    q, k, v = qkv(90)
    text = f"{name}(keep=40, sink=2, recent=8)"
    plain, packed = (
        LayerCache(policy(t), every=8) for t in (text, f"{text} + kivi(bits=8, group=8, residual=8)")
    )
    want, got = run(plain, q, k, v, cuts), run(packed, q, k, v, cuts)
    assert packed.packed is not None
    assert packed.kept is not None
    assert sum(packed.packed.counts) > 0
    assert min(packed.kept.counts) >= 8
    assert all(m <= 8 * n <= 2 * m for m, n in zip(packed.packed.counts, packed.packed.blocks, strict=True))
    if len(cuts) == 1:
        assert all(n % 8 == 0 for n in packed.packed.counts)
        assert packed.counts == plain.counts
        for a, b in zip(packed._held()[2:], plain._held()[2:], strict=True):
            there = plain._held()[3]
            assert torch.equal(a[there], b[there])
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)


def rows(cuts: int, name: str = "snapkv", keep: int = 64, n: int = 100) -> LayerCache:
    """A layer whose policy has chosen `cuts` times in decoding among keys that are packed to two bits."""
    q, k, v = qkv(n + 8 * cuts)
    text = f"{name}(keep={keep}, sink=2, recent=8) + kivi(bits=2, group=16, residual=8)"
    cache = LayerCache(policy(text), every=8)
    run(cache, q, k, v, [n, *[1] * 8 * cuts])
    return cache


def test_dropped_keys_leave_gaps_until_half_of_a_block_is_gone() -> None:
    cache = rows(3)
    assert cache.packed is not None
    assert (cache.packed.positions < 0).any()
    assert all(m <= 16 * n <= 2 * m for m, n in zip(cache.packed.counts, cache.packed.blocks, strict=True))
    k, v, positions, there = cache._held()
    assert cache.counts == tuple(there.flatten(0, 1).sum(1).tolist()) == (64,) * (B * G)
    for row in range(B * G):
        at = positions.flatten(0, 1)[row][there.flatten(0, 1)[row]]
        assert (at.diff() > 0).all()
        assert (at >= 0).all()
    new = qkv(1, seed=8)
    cache.append(*new[1:])
    mask = torch.cat((there, torch.ones(B, G, 1, dtype=torch.bool)), 2).repeat_interleave(2, 1)[:, :, None]
    want = sc.attend(new[0], torch.cat((k, new[1]), 2), torch.cat((v, new[2]), 2), "full", mask=mask)
    torch.testing.assert_close(cache.attend(new[0]), want, atol=1e-5, rtol=1e-5)
    one = cache.packed.select([2, 3])
    assert one.counts == cache.packed.counts[2:]


def test_thinned_by_hand() -> None:
    k = numbers(1, 2, 32, 8)
    keep = torch.ones(1, 2, 32, dtype=torch.bool)
    keep[0, 1, 24:] = False
    at = torch.arange(32).expand(1, 2, 32)
    made = PackedSegments.of(k, k, at, keep, bits=8, group=8, block=8, by_channel=True)
    drop = keep[0].clone()
    drop[0, 0], drop[0, 8:13], drop[1, 8:12], drop[1, 16:24] = False, False, False, False
    less, held = made.thinned(drop)
    assert less.blocks == (3, 2)
    assert less.counts == (7 + 8 + 8, 8 + 4)
    assert held[0].nonzero().flatten().tolist() == [*range(1, 8), *range(16, 32)]
    assert held[1].nonzero().flatten().tolist() == [*range(8), *range(12, 16)]
    _, _, positions, there = less.padded()
    for row in range(2):
        assert positions[row][there[row]].tolist() == held[row].nonzero().flatten().tolist()
    assert torch.equal(less.keys.codes[0], made.keys.codes[0])


@pytest.mark.parametrize(("name", "most"), [("h2o", 1.05), ("snapkv", 1.8)])
def test_keys_hardly_drift_while_a_policy_chooses_again(name: str, most: float) -> None:
    """Keys of a text that outlive 40 choices are little further from their own than after the first.

    Not at all where the same ones stay, as by h2o; snapkv with queries at random drops seven of eight of them meanwhile.
    """
    errors = []
    for cuts in (0, 40):
        cache = rows(cuts, name, 128, 300)
        _, k, _ = qkv(300 + 8 * cuts)
        held, _, positions, there = cache._held()
        old = there & (positions < 280)
        true = k.gather(2, positions.clamp_min(0)[..., None].expand_as(held))
        errors.append(float((held - true)[old].norm() / true[old].norm()))
    assert old.sum() > 40
    assert errors[1] < most * errors[0]


def test_mass_goes_with_packed_keys() -> None:
    q, k, v = qkv(40)
    text = "h2o(keep=1.0, sink=0, recent=0)"
    plain, packed = (LayerCache(policy(t), every=3) for t in (text, text + " + kivi(8, group=8, residual=3)"))
    for cache in (plain, packed):
        run(cache, q, k, v, [21, *[1] * 19])
    assert plain.mass is not None
    assert packed.mass is not None
    torch.testing.assert_close(packed.mass, plain.mass, atol=0.05, rtol=0.05)


def test_padding_is_never_packed() -> None:
    q, k, v = qkv(40)
    there = torch.ones(B, 40, dtype=torch.bool)
    there[0, :13] = False
    k, v = (x.masked_fill(~there[:, None, :, None], torch.nan) for x in (k, v))
    cache = LayerCache(policy("kivi(bits=4, group=8, residual=4)"))
    cache.append(k, v, there)
    cache.compress(q)
    assert cache.packed is not None
    assert cache.packed.counts == (16, 16, 32, 32)
    assert cache.counts == (27, 27, 40, 40)
    assert cache.packed.positions.tolist() == [13, 13, 0, 0]
    _, _, positions, held = cache._held()
    assert positions[0][held[0]].tolist() == [*range(13, 40)] * G
    new = qkv(1, seed=3)
    cache.append(*new[1:])
    out = cache.attend(new[0])
    assert out.isfinite().all()
    alone = LayerCache(cache.format if cache.format is not None else Full())
    alone.append(k[:1, :, 13:], v[:1, :, 13:])
    alone.compress(q[:1, :, 13:])
    alone.append(*(x[:1] for x in new[1:]))
    torch.testing.assert_close(out[:1], alone.attend(new[0][:1]))


def test_rows_follow_a_beam() -> None:
    q, k, v = qkv(50)
    text = "adakv(keep=24, sink=1, recent=2, window=4) + kivi(bits=4, group=8, residual=3)"
    one, two = (LayerCache(policy(text), every=100) for _ in range(2))
    for cache in (one, two):
        run(cache, q, k, v, [50])
    order = [1, 1, 0]
    two.select(order)
    more = qkv(1, seed=5)
    one.append(*more[1:])
    two.append(*(x[order] for x in more[1:]))
    torch.testing.assert_close(two.attend(more[0][order]), one.attend(more[0])[order])


def test_short_texts_and_short_rows_stay_plain() -> None:
    q, k, v = qkv(10)
    cache = LayerCache(policy("kivi"), every=2)
    out = run(cache, q, k, v, [5, 1, 1, 1, 1, 1])
    torch.testing.assert_close(out, sc.attend(q, k, v, "causal"), atol=2e-6, rtol=2e-6)
    assert cache.packed is not None
    assert cache.packed.counts == (0,) * (B * G)
    k, v = numbers(1, 3, 16, 4), numbers(1, 3, 16, 4, seed=1)
    keep = torch.zeros(1, 3, 16, dtype=torch.bool)
    keep[0, 0], keep[0, 2, ::2] = True, True
    at = torch.arange(16).expand(1, 3, 16)
    made = PackedSegments.of(k, v, at, keep, bits=8, group=8, block=8, by_channel=True)
    assert made.counts == (16, 0, 8)
    assert made.positions.shape == (3, 8)  # of each key: the last row's do not follow one another
    q = numbers(1, 6, 2, 4, seed=2)
    found = made.read(q)
    assert found is not None
    want = sc.attend(q, k, v, "full", mask=keep.repeat_interleave(2, 1)[:, :, None], need=("out", "lse"))
    torch.testing.assert_close(found[0], want.out, atol=0.02, rtol=0.02)
    assert torch.isneginf(found[1][:, 2:4]).all()
    _, _, positions, there = made.padded()
    assert positions[there].tolist() == [*range(16), *range(0, 16, 2)]
    with pytest.raises(ValueError, match="whole blocks"):
        PackedSegments.of(k, v, at, keep, bits=8, group=8, block=16, by_channel=True)


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return made


def test_reading_never_holds_the_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d = 8192, 32
    k, v = numbers(1, 2, n, d), numbers(1, 2, n, d, seed=1)
    cache = LayerCache(policy("kivi(bits=2, residual=0)"))
    cache.append(k, v)
    cache.compress(k)
    assert cache.packed is not None
    q = numbers(1, 4, 1, d, seed=2)
    whole = cache.packed.read(q)
    monkeypatch.setattr("saccade.cache.packed.SLAB", 512)
    with Largest() as seen:
        slabs = cache.packed.read(q)
    assert whole is not None
    assert slabs is not None
    torch.testing.assert_close(slabs[0], whole[0], atol=1e-5, rtol=1e-5)
    assert seen.bytes <= 512 * d * 4 * 1.01
    with Largest() as seen:  # nor does the next choice
        cache.append(k[:, :, :64], v[:, :, :64])
        cache.compress(q)
    assert seen.bytes <= cache.packed.keys.codes.numel() * 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(60))
    cache = LayerCache(policy("kivi(bits=8, group=8, residual=8)"), every=4)
    out = run(cache, q, k, v, [50, *[1] * 10])
    assert out.dtype == dtype
    torch.testing.assert_close(out, sc.attend(q, k, v, "causal"), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "text",
    [
        "kivi",
        "kivi(bits=4, group=32)",
        "snapkv(keep=0.5) + kivi(bits=4)",
        "(snapkv | tova(keep=64)) + kivi",
        "full",
        "oscar(rotation='hadamard', clip=0.95)",
    ],
)
def test_texts_round_trip(text: str) -> None:
    assert str(policy(text)) == text
    assert policy(str(policy(text))) == policy(text)


def test_values_join_like_their_texts() -> None:
    both = policy("snapkv(keep=0.5) + kivi(bits=4)")
    assert both == Stored(evict.SnapKV(0.5), Kivi(4))
    assert evict.SnapKV(0.5) + Kivi(4) == both
    assert policy("full + kivi") == policy("kivi") == policy(Kivi()) == Stored(Full(), Kivi())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kivi(bits=3)", "bits is 2, 4 or 8"),
        ("kivi(group=12)", "multiple of 8"),
        ("kivi(residual=-1)", "at least 0"),
        ("kivi(rotation='best')", "rotation is one of"),
        ("oscar(clip=0.0)", "clip is a share"),
        ("snapkv + tova", "a policy and the format"),
        ("kivi + snapkv", "a policy and the format"),
        ("kivi + kivi", "a policy and the format"),
        ("snapkv + kivi | tova", r"\(a \| b\) \+ format"),
        ("kivi | tova", r"\(a \| b\) \+ format"),
        ("snapkv + kivi(4) + kivi(2)", "a policy and the format"),
        ("full(keep=0.5)", "full"),
        ("snapkv * kivi", "no policy"),
        ("snapkv + 3", "no policy"),
    ],
)
def test_bad_texts_are_refused(text: str, says: str) -> None:
    with pytest.raises(MechanismError, match=says):
        policy(text)


def test_heads_that_fill_no_bytes_are_refused() -> None:
    k = numbers(1, 1, 20, 3)
    cache = LayerCache(Kivi(2, group=8, residual=0))
    cache.append(k, k)
    with pytest.raises(ValueError, match="more bits"):
        cache.compress(k)


def test_a_sketch_is_not_packed() -> None:
    with pytest.raises(MechanismError, match="which no format packs"):
        layer_cache(policy("subgen + kivi"))
