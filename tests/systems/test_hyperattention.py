"""S235, HyperAttention: exact in buckets of sorted hashes, sampled outside of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.pattern import shuffled
from saccade.parts.sortlsh import gray_hash
from systems.helpers import below, dense, exponent, flops, largest_temporary, qkv, stepwise

pytestmark = pytest.mark.system("S235")


def hashes(x: Tensor, seed: int = 0) -> Tensor:
    """Gray code read as a number, bit by bit."""
    planes = torch.randn(16, x.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.zeros(x.shape[:-1], dtype=torch.long)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])):
        number, last = 0, 0
        for plane in planes:
            last ^= int(x[tuple(at)] @ plane > 0)
            number = 2 * number + last
        found[tuple(at)] = number
    return found


def node(
    q: Tensor, k: Tensor, v: Tensor, bucket: list[int], place: list[int], picked: set[int]
) -> list[tuple[Tensor, Tensor]]:
    """For each query: logits and values of what it reads of one node; `bucket` of queries, `place` of keys in buckets."""
    found = []
    for i in range(len(q)):
        inside = [j for j in range(len(k)) if place[j] == bucket[i]]
        outside = [j for j in picked if place[j] != bucket[i]]
        weight = (len(k) - len(inside)) / len(outside) if outside else 1.0
        keys = inside + outside
        s = torch.stack([q[i] @ k[j] / math.sqrt(q.shape[-1]) for j in keys])
        s = s + torch.tensor([0.0] * len(inside) + [math.log(weight)] * len(outside), dtype=s.dtype)
        found.append((s, v[keys]))
    return found


def picked(key: int, count: int, samples: int) -> set[int]:
    """Places that a shuffle puts first."""
    x = torch.arange(count)
    return set((shuffled(x, torch.full_like(x, key), count, 0) < samples).nonzero().flatten().tolist())


def ranks(codes: Tensor) -> list[int]:
    order = sorted(range(len(codes)), key=lambda t: (int(codes[t]), t))
    return [order.index(t) for t in range(len(codes))]


def whole(q: Tensor, k: Tensor, v: Tensor, block: int, samples: int) -> Tensor:
    """One head at a time, one query at a time."""
    out, q_code, k_code = torch.zeros_like(q), hashes(q), hashes(k)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            bucket = [r * k.shape[2] // q.shape[2] // block for r in ranks(q_code[b, h])]
            place = [r // block for r in ranks(k_code[b, h])]
            read = node(q[b, h], k[b, h], v[b, h], bucket, place, picked(h, k.shape[2], samples))
            for i, (s, values) in enumerate(read):
                out[b, h, i] = torch.softmax(s, 0) @ values
    return out


def halves(q: Tensor, k: Tensor, v: Tensor, block: int, samples: int, base: int) -> Tensor:
    """The causal form by recursion: each half for itself, and the right one against the left."""
    heads, n = q.shape[1], q.shape[2]
    q_code, k_code, out = hashes(q), hashes(k), torch.zeros_like(q)

    def split(b: int, h: int, start: int, run: int) -> list[list[tuple[Tensor, Tensor]]]:
        stop = min(n, start + run)
        if run == base:
            return [
                [(k[b, h, start : i + 1] @ q[b, h, i] / math.sqrt(q.shape[-1]), v[b, h, start : i + 1])]
                for i in range(start, stop)
            ]
        half = run // 2
        if stop <= start + half:
            return split(b, h, start, half)
        left, right = split(b, h, start, half), split(b, h, start + half, half)
        cut, rest = slice(start, start + half), slice(start + half, stop)
        codes = sorted(k_code[b, h, cut].tolist())
        bucket = []
        for code in q_code[b, h, rest].tolist():
            below_, equal = sum(c < code for c in codes), sum(c == code for c in codes)
            bucket.append(min((2 * below_ + equal) // 2, half - 1) // block)
        place = [r // block for r in ranks(k_code[b, h, cut])]
        sample = picked(start // half * heads + h, half, samples)
        across = node(q[b, h, rest], k[b, h, cut], v[b, h, cut], bucket, place, sample)
        return left + [own + [far] for own, far in zip(right, across, strict=True)]

    run = base
    while run < n:
        run *= 2
    for b in range(q.shape[0]):
        for h in range(heads):
            for i, read in enumerate(split(b, h, 0, run)):
                s, values = (torch.cat(x) for x in zip(*read, strict=True))
                out[b, h, i] = torch.softmax(s, 0) @ values
    return out


def test_neighbours_in_gray_order_differ_in_one_sign() -> None:
    signs = torch.cartesian_prod(*([torch.tensor([-1.0, 1.0])] * 5))
    order = gray_hash(signs, torch.eye(5)).argsort()
    assert torch.equal(gray_hash(signs, torch.eye(5)).sort().values, torch.arange(32))
    assert ((signs[order[1:]] != signs[order[:-1]]).sum(-1) == 1).all()


@pytest.mark.parametrize("kernel", ["hash", "slab"])
@pytest.mark.parametrize(
    ("n", "block", "samples"), [(1, 4, 4), (20, 4, 5), (23, 5, 0), (17, 3, 40), (9, 16, 2)]
)
def test_buckets_and_samples_equal_the_formula(kernel: str, n: int, block: int, samples: int) -> None:
    q, k, v = qkv(2, 2, n, 6)
    text = f"sort_lsh({block}, samples={samples}, base={block})"
    found = sc.attend(q, k, v, text, kernel=kernel)
    torch.testing.assert_close(found, whole(q, k, v, block, samples), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", ["hash", "slab"])
@pytest.mark.parametrize(
    ("n", "block", "samples", "base"),
    [(1, 2, 2, 4), (16, 2, 3, 4), (27, 2, 3, 4), (30, 3, 1, 3), (21, 4, 0, 4)],
)
def test_halves_equal_the_recursion(kernel: str, n: int, block: int, samples: int, base: int) -> None:
    q, k, v = qkv(2, 2, n, 6)
    text = f"causal + hyperattention({block}, samples={samples}, base={base})"
    found = sc.attend(q, k, v, text, kernel=kernel)
    torch.testing.assert_close(found, halves(q, k, v, block, samples, base), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "text", ["hyperattention(4, samples=5, base=4)", "causal + hyperattention(4, samples=5, base=4)"]
)
def test_gradients_equal_those_of_the_formula(text: str) -> None:
    tensors = [x.requires_grad_() for x in qkv(1, 2, 21, 6)]
    q, k, v = tensors
    truth = halves(q, k, v, 4, 5, 4) if text.startswith("causal") else whole(q, k, v, 4, 5)
    wanted = torch.autograd.grad(truth.sin().sum(), tensors)
    for kernel in ("hash", "slab"):
        found = torch.autograd.grad(sc.attend(q, k, v, text, kernel=kernel).sin().sum(), tensors)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", ["64, samples=1", "1, samples=64, base=8", "8, samples=100, base=8"])
def test_one_bucket_or_all_samples_are_exact(size: str) -> None:
    q, k, v = qkv(2, 4, 64, 8, kv=2)
    for exact, limit in (("", None), ("causal + ", below(64))):
        found = sc.attend(q, k, v, f"{exact}hyperattention({size})", kernel="hash")
        torch.testing.assert_close(found, dense(q, k, v, limit), atol=1e-10, rtol=0)


def test_the_error_of_samples_falls_with_the_root_of_their_number() -> None:
    q, k, v = qkv(1, 8, 1024, 16)
    full, counts, errors = dense(q, k, v), [8, 32, 128], []
    for m in counts:
        each = [sc.attend(q, k, v, f"hyperattention(1, samples={m}, seed={s})") - full for s in range(4)]
        errors.append(float(torch.stack(each).square().mean().sqrt()))
    assert -0.6 < exponent(counts, errors) < -0.4


def test_the_denominator_is_unbiased() -> None:
    q, k, v = qkv(1, 64, 96, 8)
    scores = (q @ k.mT / math.sqrt(8)).exp().sum(-1)
    each = [
        sc.attend(q, k, v, f"hyperattention(8, samples=12, base=8, seed={s})", need=("out", "lse")).lse.exp()
        for s in range(12)
    ]
    ratio = torch.stack(each) / scores
    assert abs(float(ratio.mean()) - 1) < 0.02
    assert float(ratio.std()) > 0.1


def test_near_duplicates_share_a_bucket_far_more_often_than_chance() -> None:
    caught = []
    for seed in range(4):
        k = torch.randn(1, 4, 512, 64)
        q, order = k + 0.3 * torch.randn_like(k), torch.randperm(512)
        text = f"sort_lsh(32, samples=0, base=32, seed={seed})"
        chosen = sc.attend(q, k[:, :, order], k, text, need=("selection",)).selection
        caught.append(float((chosen.q[:, :, 0, order] == chosen.k[:, :, 0]).float().mean()))
    assert min(caught) >= 6 * 32 / 512
    assert max(caught) < 0.7


@pytest.mark.parametrize(
    ("text", "low", "high"), [("hyperattention", 0.95, 1.05), ("causal + hyperattention", 1.0, 1.3)]
)
def test_work_and_memory_are_near_linear(text: str, low: float, high: float) -> None:
    lengths = [2048, 4096, 8192, 16384]
    planned = [float(sc.plan(text, (1, 1, n, 32)).cost.flops) for n in lengths]
    assert low < exponent(lengths, planned) < high
    assert sc.plan(text, (1, 1, 16384, 32)).kernel == "hash"
    counted, memory = [], []
    for n in lengths[:3]:
        q, k, v = qkv(1, 1, n, 32, dtype=torch.float32)
        counted.append(float(flops(lambda q=q, k=k, v=v: sc.attend(q, k, v, text))))
        memory.append(largest_temporary(lambda q=q, k=k, v=v: sc.attend(q, k, v, text)))
    assert low < exponent(lengths[:3], counted) < high
    for a, b in zip(counted, planned, strict=False):
        assert 0.75 < a / b < 1.25
    assert memory[-1] < 8192 * 8192 * 4 / 8


@pytest.mark.parametrize("n", [37, 64, 100])
def test_causal_outputs_do_not_move_with_later_tokens(n: int) -> None:
    """Queries find their bucket among keys that are all past; hashing the whole sequence at once would move them."""
    q, k, v = qkv(1, 4, n, 8)
    later = (torch.arange(n) >= n // 2)[:, None]
    moved = [torch.where(later, torch.randn_like(x), x) for x in (q, k, v)]
    text = "hyperattention(4, samples=4, base=8)"
    before, after = (sc.attend(*x, f"causal + {text}") for x in ((q, k, v), moved))
    torch.testing.assert_close(before[:, :, : n // 2], after[:, :, : n // 2], atol=1e-12, rtol=0)
    assert sc.mechanism(f"causal + {text}").causality == "safe"
    at_once = [sc.attend(*x, text, need=("selection",)).selection for x in ((q, k, v), moved)]
    same = [(x.q[:, :, 0, :, None] == x.k[:, :, 0, None])[:, :, : n // 2, : n // 2] for x in at_once]
    assert (same[0] != same[1]).any()


def test_samples_stay_in_their_run() -> None:
    q, k, v = qkv(1, 2, 64, 8)
    chosen = sc.attend(
        q, k, v, "causal + hyperattention(4, samples=3, base=8)", need=("selection",)
    ).selection
    for level, run in ((1, 8), (2, 16), (3, 32)):
        counts = chosen.sampled[0, :, level].unflatten(-1, (-1, run)).sum(-1)
        assert (counts == 3).all()
    assert not chosen.sampled[:, :, 0].any()


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(16, 2, "causal + hyperattention(4, samples=4, base=8)").double()
    x = torch.randn(2, 43, 16, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_later_queries_of_a_longer_past() -> None:
    q, k, v = qkv(1, 2, 50, 8)
    text = "causal + hyperattention(4, samples=4, base=8)"
    for rows in (1, 7, 30):
        found = sc.attend(q[:, :, -rows:], k, v, text, kernel="hash")
        torch.testing.assert_close(found, sc.attend(q, k, v, text)[:, :, -rows:], atol=1e-12, rtol=0)


def test_a_choice_can_be_replayed() -> None:
    q, k, v = qkv(1, 2, 40, 8)
    for text in ("hyperattention(8, samples=4, base=8)", "causal + hyperattention(8, samples=4, base=8)"):
        first = sc.attend(q, k, v, text, need=("out", "selection"))
        again = sc.attend(q, k, v, text, selection=first.selection)
        torch.testing.assert_close(again, first.out, atol=0, rtol=0)


def test_bad_arguments() -> None:
    with pytest.raises(sc.MechanismError, match=r"base must be a multiple of block=6, got 16; use 18"):
        sc.mechanism("hyperattention(6, base=16)")
    with pytest.raises(sc.MechanismError, match="planes must be at most 30, got 31"):
        sc.mechanism("sort_lsh(planes=31)")
    q, k, v = qkv(1, 2, 64, 8)
    with pytest.raises(sc.NotSupported, match=r"hash: the limit window\(9\) cuts buckets"):
        sc.attend(q, k, v, "window(9) & sort_lsh(4, base=8)", kernel="hash")
