"""S154, threshold relative attention: keys below a threshold are gone, and distances count the keys that are left."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from parts import tools
from saccade.parts.algebra import Pairs, static_exist
from saccade.parts.mask import Causal, Sink, Window
from saccade.systems.tra import ThresholdCount
from saccade.tasks.flipflop import FlipFlop
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import below, qkv, stepwise, train

pytestmark = pytest.mark.system("S154")


def by_loops(q: Tensor, k: Tensor, forget: Tensor, threshold: float) -> Tensor:
    """The logits (b, h, L, S), -inf for what is dropped or later; the last query stands at the last key."""
    (b, h, rows, d), keys = q.shape, k.shape[2]
    out = torch.full((b, h, rows, keys), -math.inf, dtype=q.dtype)
    for n, head, row in itertools.product(range(b), range(h), range(rows)):
        i, kept = row + keys - rows, 0
        log = -math.log1p(math.exp(-float(forget[n, head, row])))
        for j in range(i, -1, -1):
            s = float(q[n, head, row] @ k[n, head * k.shape[1] // h, j]) / math.sqrt(d)
            if s >= threshold:
                kept += 1
                out[n, head, row, j] = s + kept * log
    return out


def normed(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


@pytest.mark.parametrize("threshold", [0.0, -0.7, 0.3])
@pytest.mark.parametrize("pairs", [Causal(), Causal() & (Window(3) | Sink(2))])
def test_logits_by_loops(threshold: float, pairs: Pairs) -> None:
    q, k, _ = qkv(2, 4, 6, 5, kv=2, keys=9)
    forget = torch.randn(2, 4, 6, dtype=torch.float64)
    m = sc.Pairwise(pairs=pairs, logits=(ThresholdCount(threshold),))
    got = tools.logits(m, q, k, streams={"forget": forget})
    want = by_loops(q, k, forget, threshold)
    exist = static_exist(pairs, torch.arange(3, 9)[:, None], torch.arange(9))
    torch.testing.assert_close(got, want.masked_fill(~exist, -math.inf), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", ["slab", "reference"])
def test_output_and_gradients_are_those_of_the_formula(kernel: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 33, 6, kv=2))
    forget = torch.randn(1, 4, 33, dtype=torch.float64, requires_grad=True)
    kept = torch.isfinite(by_loops(normed(q).detach(), normed(k).detach(), forget.detach(), 0.0))
    s = normed(q) @ normed(k).repeat_interleave(2, 1).mT / math.sqrt(6)
    count = kept.double().flip(-1).cumsum(-1).flip(-1)
    s = (s + count * forget.sigmoid().log()[..., None]).masked_fill(~kept, -1e9)
    w = s.softmax(-1).where(kept.any(-1, keepdim=True), 0)
    expected = w @ v.repeat_interleave(2, 1)
    assert not kept.any(-1).all(), "no row is empty: the case is not covered"
    found = sc.attend(q, k, v, "tra", streams={"forget": forget}, kernel=kernel)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    given, wanted = (torch.autograd.grad(x.sin().sum(), (q, k, v, forget)) for x in (found, expected))
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_a_threshold_that_all_keys_reach_gives_plain_relative_attention() -> None:
    q, k, v = qkv(2, 4, 21, 8, kv=2)
    forget = torch.randn(2, 4, 21, dtype=torch.float64)
    found = sc.attend(q, k, v, "tra(-1e30)", streams={"forget": forget})
    distance = torch.arange(21)[:, None] - torch.arange(21) + 1
    s = normed(q) @ normed(k).repeat_interleave(2, 1).mT / math.sqrt(8)
    s = s + forget.sigmoid().log()[..., None] * distance
    expected = s.masked_fill(~below(21), -math.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("many", [1, 5, 60])
def test_keys_below_the_threshold_change_nothing_however_many(many: int) -> None:
    q, k, v = qkv(2, 2, 12, 8)
    q[..., 0] = q[..., 0].abs() + 5
    noise_q, noise_k, noise_v = qkv(2, 2, many, 8)
    noise_k[..., 0] = -50.0
    forget = torch.randn(2, 2, 12, dtype=torch.float64)

    def inserted(x: Tensor, noise: Tensor) -> Tensor:
        return torch.cat((x[:, :, :7], noise, x[:, :, 7:]), 2)

    alone = sc.attend(q, k, v, "tra", streams={"forget": forget})
    crowd = sc.attend(
        inserted(q, noise_q),
        inserted(k, noise_k),
        inserted(v, 1e6 * noise_v),
        "tra",
        streams={"forget": inserted(forget, torch.zeros(2, 2, many, dtype=torch.float64))},
    )
    torch.testing.assert_close(
        torch.cat((crowd[:, :, :7], crowd[:, :, 7 + many :]), 2), alone, rtol=0, atol=1e-14
    )
    torch.testing.assert_close(crowd[:, :, 7 + many :], alone[:, :, 7:], rtol=0, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_row_that_keeps_no_key_gives_zeros(rows: int) -> None:
    """Also one token at a time, where every pair exists by rule."""
    q, k, v = torch.ones(1, 1, rows, 4), -torch.ones(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    streams = {"forget": torch.zeros(1, 1, rows)}
    found = sc.attend(q, k, v, "tra", streams=streams, need=("out", "lse", "weights"))
    assert (found.out == 0).all()
    assert (found.weights == 0).all()
    assert torch.isneginf(found.lse).all()


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(16, 2, "tra").double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)


def test_padding_is_not_counted() -> None:
    layer = sc.nn.Attention(16, 2, "tra(-0.3)").double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    alone = layer(x[1:, :7])
    x[1, 7:] = math.nan
    found = layer(x, key_lengths=torch.tensor([12, 7]))
    torch.testing.assert_close(found[1:, :7], alone, atol=1e-12, rtol=0)


def test_what_would_bring_dropped_pairs_back_is_refused() -> None:
    with pytest.raises(
        sc.MechanismError, match=r"threshold_count drops pairs for good, so it stands last of the log"
    ):
        sc.mechanism("causal + threshold_count + softcap")
    assert sc.mechanism("causal + softcap + threshold_count").causal
    with pytest.raises(sc.MechanismError, match="threshold_count needs key order"):
        sc.mechanism("threshold_count")
    with pytest.raises(sc.MechanismError, match="threshold must be a number, got none"):
        sc.mechanism("tra(none)")


def errors(mechanism: str, seed: int = 0, steps: int = 400) -> list[float]:
    """Errors on flip-flops of 32, 64 and 256 tokens, trained on 32 after a start on 16."""
    torch.manual_seed(seed)
    easy, task, generator = FlipFlop(16, 0.4), FlipFlop(32), torch.Generator().manual_seed(seed)
    model = sc.nn.Transformer(5, dim=32, depth=2, heads=2, mechanism=mechanism, positions="none")
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = (easy if step < steps // 2 else task).batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    found = []
    for length in (32, 64, 256):
        tokens, targets = FlipFlop(length).batch(16384 // length, torch.Generator().manual_seed(1))
        with torch.no_grad():
            found.append(1 - accuracy(model(tokens), targets))
    return found


def test_flip_flops_of_eight_times_the_trained_length() -> None:
    own = errors("tra")
    assert own[0] <= 0.01
    for other in ("causal + rope", "causal + alibi"):
        assert own[2] <= errors(other)[2] / 2
