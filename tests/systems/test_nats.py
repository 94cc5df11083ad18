"""S111, neural attention search: tokens that live always, until the next that does, or for a window."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.systems.nats import gumbel
from saccade.tasks.needle import Needle
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import below, dense, qkv, stepwise, train

pytestmark = pytest.mark.system("S111")

GLOBAL, LOCAL, SLIDING = range(3)


def logits_of(types: Tensor) -> Tensor:
    """Lifetime logits (..., S, 3) whose greatest is that of the type (..., S)."""
    return F.one_hot(types, 3).double() * 4 + torch.rand(*types.shape, 3, dtype=torch.float64)


def product(odds: Tensor, window: int) -> Tensor:
    """m (b, h, S, S) of G, L, S (b, h, S, 3), pair by pair."""
    b, h, n, _ = odds.shape
    rows = []
    for i in range(n):
        for j in range(n):
            g, local, sliding = odds[:, :, j].unbind(-1)
            spared = torch.ones(b, h, dtype=odds.dtype)
            for t in range(j + 1, i + 1):
                spared = spared * (1 - odds[:, :, t, 0])
            rows.append(g + sliding * (i - j < window) + local * spared if j <= i else torch.zeros_like(g))
    return torch.stack(rows, -1).unflatten(-1, (n, n))


def weighed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """Values mixed by m exp(s) over its sum."""
    repeat = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(repeat, 1).mT / math.sqrt(q.shape[-1])
    e = s.exp() * m
    return (e / e.sum(-1, keepdim=True)) @ v.repeat_interleave(repeat, 1)


@pytest.mark.parametrize("mode", ["run", "hard"])
@pytest.mark.parametrize("window", [1, 5, 40])
def test_tokens_of_one_type_alone(mode: str, window: int) -> None:
    q, k, v = qkv(2, 4, 23, 8, kv=2)
    distance = torch.arange(23)[:, None] - torch.arange(23)
    for kind, exist in ((GLOBAL, below(23)), (SLIDING, below(23) & (distance < window)), (LOCAL, below(23))):
        streams = {"lifetime": logits_of(torch.full((2, 4, 23), kind))}
        found = sc.attend(q, k, v, f"nats({window}, mode={mode})", streams=streams)
        torch.testing.assert_close(found, dense(q, k, v, exist), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["run", "hard"])
def test_mixed_types_are_the_product_of_the_paper(mode: str) -> None:
    q, k, v = qkv(2, 4, 17, 8, kv=2)
    types = torch.randint(3, (2, 4, 17))
    m = product(F.one_hot(types, 3).double(), 3)
    assert set(m.unique().tolist()) == {0.0, 1.0}
    found = sc.attend(q, k, v, f"nats(3, mode={mode})", streams={"lifetime": logits_of(types)})
    torch.testing.assert_close(found, weighed(q, k, v, m), atol=1e-12, rtol=0)
    choice = sc.attend(
        q, k, v, "nats(3)", streams={"lifetime": logits_of(types)}, need=("selection",)
    ).selection
    at = torch.arange(17)
    assert torch.equal(choice.exist(slice(4, 9), at, at), m.bool()[:, :, 4:9])


def test_soft_weights_and_their_gradients_are_those_of_the_product() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 9, 6, kv=2))
    logits = torch.randn(1, 4, 9, 3, dtype=torch.float64, requires_grad=True)
    expected = weighed(q, k, v, product(logits.softmax(-1), 3))
    found = sc.attend(q, k, v, "nats(3, mode=soft)", streams={"lifetime": logits})
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    given, wanted = (torch.autograd.grad(x.sin().sum(), (q, k, v, logits)) for x in (found, expected))
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_hard_weights_have_the_gradient_of_the_soft_mask_also_where_a_pair_is_dead() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 9, 6))
    logits = torch.randn(1, 2, 9, 3, dtype=torch.float64, requires_grad=True)
    hard = product(F.one_hot(logits.argmax(-1), 3).double(), 3).requires_grad_()
    expected = weighed(q, k, v, hard)
    *wanted, slope = torch.autograd.grad(expected.sin().sum(), (q, k, v, hard))
    assert slope[(hard == 0) & below(9)].abs().max() > 1e-3
    (to_types,) = torch.autograd.grad(product(logits.softmax(-1), 3), logits, slope)
    found = sc.attend(q, k, v, "nats(3, mode=hard)", streams={"lifetime": logits})
    given = torch.autograd.grad(found.sin().sum(), (q, k, v, logits))
    for a, b in zip(given, [*wanted, to_types], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_dead_pair_of_any_logit_leaves_weights_and_gradients_finite() -> None:
    q, k, v = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    k[:, :, 0] = 1e4
    logits = logits_of(torch.tensor([[[LOCAL, GLOBAL, GLOBAL]]])).float().requires_grad_()
    found = sc.attend(q, k, v, "nats(1, mode=hard)", streams={"lifetime": logits})
    torch.testing.assert_close(found[0, 0, 2], v[0, 0, 1:].mean(0))
    found.square().sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("mode", ["run", "hard"])
def test_decoding_with_dropped_tokens_equals_the_whole_call(mode: str, kv: int) -> None:
    q, k, v = qkv(2, 4, 40, 8, kv=kv)
    types = torch.multinomial(torch.tensor([0.15, 0.35, 0.5]), 320, replacement=True).view(2, 4, 40)
    text, logits = f"nats(4, mode={mode})", logits_of(types)
    whole = sc.attend(q, k, v, text, streams={"lifetime": logits})
    m = product(F.one_hot(types, 3).double(), 4).bool()
    state = sc.init_state(text, 2, kv, 8, heads=4, dtype=torch.float64)
    for piece in (slice(0, 13), slice(13, 20), *(slice(t, t + 1) for t in range(20, 40))):
        found = sc.attend(
            q[:, :, piece], k[:, :, piece], v[:, :, piece], text,
            state=state, streams={"lifetime": logits[:, :, piece]}, need=("out", "state"),
        )  # fmt: skip
        torch.testing.assert_close(found.out, whole[:, :, piece], atol=1e-12, rtol=0)
        state, end = found.state, piece.stop
        if end < 40:  # what the next query reads of the past, or could if it opened no new segment
            read = m[:, :, end, :end] | (m[:, :, end - 1, :end] & (types[..., :end] == LOCAL))
            live = read.view(2, kv, -1, end).any(2).sum(-1)
            assert state.tensors["k"].shape[2] == live.max()
            assert torch.equal((state.tensors["last"] >= 0).view(2, kv, 4 // kv, -1)[:, :, 0].sum(-1), live)
    assert state.nbytes < 0.8 * (k.numel() + v.numel()) * 8


def test_a_layer_decodes_as_it_runs_whole() -> None:
    layer = sc.nn.Attention(16, 2, "rope + nats(3)").double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    found, held = stepwise(layer, x)
    torch.testing.assert_close(found, layer(x), atol=1e-12, rtol=0)
    assert held[-1] < 30 * 2 * 2 * 2 * 8 * 8


def test_padding_does_not_matter() -> None:
    layer = sc.nn.Attention(16, 2, "nats(3, mode=hard)").double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    alone = layer(x[1:, :7], need=("out", "losses"))
    both = layer(torch.cat((x[1:, :7], x[:1, 7:]), 1), key_lengths=torch.tensor([7]), need=("out", "losses"))
    torch.testing.assert_close(both.out[:, :7], alone.out, atol=1e-12, rtol=0)
    torch.testing.assert_close(both.losses["kept"], alone.losses["kept"])


def test_the_loss_is_the_mean_share_of_tokens_that_live() -> None:
    q, k, v = qkv(2, 2, 8, 4)
    logits = torch.randn(2, 2, 8, 3, dtype=torch.float64)
    ends = torch.tensor([8, 5])
    text = "nats(3, mode=hard)"
    found = sc.attend(q, k, v, text, streams={"lifetime": logits}, key_lengths=ends, need=("losses",)).losses
    m, want = product(logits.softmax(-1), 3), 0.0
    for b, h in itertools.product(range(2), range(2)):
        n = int(ends[b])
        want += float(m[b, h, :n, :n].sum()) / (n * (n + 1) / 2) / 4
    assert float(found["kept"]) == pytest.approx(want)


def test_gumbel_noise_draws_types_by_their_odds_and_leaves_no_trace() -> None:
    layer = sc.nn.Attention(8, 2, "nats(3, mode=hard)")
    net, x = layer.streams["lifetime"], torch.zeros(1, 6000, 8)
    with torch.no_grad():
        net.net.bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log().repeat(2))
        with gumbel(layer, torch.Generator().manual_seed(0), temperature=0.5):
            drawn = net(x, 6000)
        with gumbel(layer, torch.Generator().manual_seed(0)):
            again = net(x, 6000)
    share = F.one_hot(drawn.argmax(-1), 3).double().mean((0, 2))
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]).double().expand(2, 3), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn, 2 * again)
    assert (net(x, 6000) == net(x, 6000)[:, :, :1]).all()
    with (
        pytest.raises(ValueError, match=r"no layer of this model has a stream `lifetime`"),
        gumbel(sc.nn.Attention(8, 2), torch.Generator()),
    ):
        pass


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(sc.MechanismError, match="mode must be one of run, hard, soft, got 'sof'"):
        sc.mechanism("nats(mode=sof)")
    with pytest.raises(sc.MechanismError, match="window must be a whole number of at least 1, got 0"):
        sc.mechanism("nats(0)")
    for text in ("nats(mode=soft)", "nats + sink(4)", "nats + alibi"):
        with pytest.raises(sc.NotSupported, match="a state that drops tokens knows neither"):
            sc.init_state(text, 1, 2, 8)
    q = torch.randn(1, 1, 3, 4)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(sc.NotSupported, match="a mask of single pairs cannot follow it"):
        sc.attend(q, q, q, "nats", streams={"lifetime": torch.zeros(1, 1, 3, 3)}, mask=mask, need=("state",))


TASK = Needle(length=64, needles=2, keys=4, values=4)


def recalled(mechanism: str, steps: int = 300, seed: int = 0) -> tuple[float, sc.nn.Transformer]:
    """Accuracy of one layer that finds two needles in 64 tokens, and the model; types are drawn and their cost is ramped up."""
    torch.manual_seed(seed)
    generator, noise = (torch.Generator().manual_seed(seed + n) for n in range(2))
    model = sc.nn.Transformer(TASK.vocab, 32, 1, 2, mechanism, TASK.length)
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)
    searching = "nats" in mechanism
    if searching:  # most tokens start global, so that the search starts from full attention
        bias = model.blocks[0].attention.streams["lifetime"].net.bias
        bias.data.copy_(torch.tensor([2.0, 0.0, 0.0]).repeat(2))

    def loss(step: int) -> Tensor:
        tokens, targets = TASK.batch(32, generator)
        extra: dict[str, Tensor] = {}
        with gumbel(model, noise) if searching else contextlib.nullcontext():
            logits = model(tokens, losses=extra)
        own = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=SILENT)
        return own + min(1.0, max(0.0, step / steps - 0.4) / 0.3) * sum(extra.values(), torch.zeros(()))

    train(model.parameters(), loss, steps, rate=5e-3)
    tokens, targets = TASK.batch(256, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return accuracy(model(tokens), targets), model


def test_needles_are_found_in_a_fraction_of_the_cache_and_not_in_a_window_of_that_size() -> None:
    full, searched = recalled("causal")[0], recalled("nats(4, mode=hard)")[1]
    model = sc.nn.Transformer(TASK.vocab, 32, 1, 2, "nats(4)", TASK.length)
    model.load_state_dict(searched.state_dict())
    tokens, targets = TASK.batch(256, torch.Generator().manual_seed(1))
    state, outs, held = model.init_state(256), [], 0.0
    with torch.no_grad():
        whole = model(tokens)
        for t in range(TASK.length):
            logits, state = model.step(tokens[:, t : t + 1], state)
            outs.append(logits)
            held += float((state[0].tensors["last"] > t).double().sum(-1).mean())
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-4, rtol=0)
    every = TASK.length * (TASK.length + 1) / 2
    assert held <= 0.3 * every, held / every
    assert accuracy(torch.cat(outs, 1), targets) >= 0.95 * full
    width = math.ceil(held / TASK.length)
    assert recalled(f"window({width})")[0] <= full / 2
