"""S165, landmark attention: a grouped softmax to train, and the few blocks whose landmarks score highest to read."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.parts.selection import Blocks
from saccade.parts.tokens import Rope
from saccade.systems.landmark import with_landmarks
from saccade.tasks.passkey import Passkey
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import flops, qkv, stepwise, train

pytestmark = pytest.mark.system("S165")


def turned(x: Tensor, place: int) -> Tensor:
    """A head vector (d,) at a place of its own."""
    return Rope().map(x[None, None, None], torch.tensor([[place]]), "q", None)[0, 0, 0]


def weights_of(q: Tensor, k: Tensor, size: int, top: int | None = None) -> Tensor:
    """Weights (b, h, L, L) row by row; with `top`, of the best blocks by landmark, at most top + 1 blocks away."""
    b, h, n, d = q.shape
    w = torch.zeros(b, h, n, n, dtype=q.dtype)
    for x, y, i in itertools.product(range(b), range(h), range(n)):
        own, g = i // size, y * k.shape[1] // h
        far = own + 1 if top is None else top + 1

        def logit(
            j: int, x: int = x, y: int = y, i: int = i, g: int = g, own: int = own, far: int = far
        ) -> Tensor:
            back = min(own - j // size, far)
            distance = i % size + back * size - j % size
            return turned(q[x, y, i], distance) @ turned(k[x, g, j], 0) / math.sqrt(d)

        landmarks = {u: logit(u * size + size - 1) for u in range(own)}
        read = sorted(landmarks, key=lambda u: -float(landmarks[u].detach()))[:top]
        near = [j for j in range(own * size, i + 1) if j % size != size - 1]
        main = torch.stack([*(landmarks[u] for u in read), *(logit(j) for j in near)]).softmax(0)
        w[x, y, i, near] = main[len(read) :]
        for share, u in zip(main, read, strict=False):
            inner = range(u * size, u * size + size - 1)
            w[x, y, i, list(inner)] = share * torch.stack([logit(j) for j in inner]).softmax(0)
    return w


@pytest.mark.parametrize("top", [None, 1, 2, 9])
@pytest.mark.parametrize("length", [16, 22])
def test_every_path_equals_the_formula(top: int | None, length: int) -> None:
    q, k, v = qkv(2, 4, length, 6, kv=2)
    w = weights_of(q, k, 4, top)
    text = f"landmark_attention(4, top={'none' if top is None else top})"
    expected = w @ v.repeat_interleave(2, 1)
    for kernel in ("slab", "reference") if top is None else ("slab", "fetch", "reference"):
        torch.testing.assert_close(sc.attend(q, k, v, text, kernel=kernel), expected, atol=1e-10, rtol=0)
    found = sc.attend(q, k, v, text, need=("weights",)).weights
    torch.testing.assert_close(found, w, atol=1e-10, rtol=0)


def test_weights_sum_to_one_and_landmarks_get_none() -> None:
    q, k, v = qkv(2, 4, 50, 8, kv=2)
    w = sc.attend(q, k, v, "landmark_attention(8)", need=("weights",)).weights
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 4, 50, dtype=w.dtype), atol=1e-12, rtol=0)
    assert (w[..., 7::8] == 0).all()
    assert (w[..., 1::8] > 0).any()


@pytest.mark.parametrize("length", [40, 45])
def test_all_blocks_fetched_equal_the_form_of_training(length: int) -> None:
    q, k, v = qkv(2, 4, length, 8, kv=2)
    dense = sc.attend(q, k, v, "landmark_attention(8)")
    for kernel in ("slab", "fetch"):
        found = sc.attend(q, k, v, "landmark_attention(8, top=6)", kernel=kernel)
        torch.testing.assert_close(found, dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("top", ["none", "2"])
def test_gradients_are_those_of_the_formula(top: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 10, 4))
    expected = weights_of(q, k, 3, None if top == "none" else 2) @ v
    found = sc.attend(q, k, v, f"landmark_attention(3, top={top})")
    given, wanted = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (found, expected))
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_no_far_block_is_farther_than_the_first_one_that_is() -> None:
    """Beyond `far` blocks the logit depends on the place inside the block alone."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    same, v = k.expand(1, 1, 80, 8), torch.zeros(1, 1, 80, 1, dtype=torch.float64)
    text = "causal + stingy_rope(8, far=3)"
    w = sc.attend(q, same, v, text, need=("weights",)).weights[0, 0, 0].view(10, 8)
    torch.testing.assert_close(w[:7], w[6:7].expand(7, 8), atol=1e-14, rtol=0)
    assert (w[7] - w[6]).abs().max() > 1e-6


def test_a_masked_block_gives_its_weight_to_the_others() -> None:
    q, k, v = qkv(1, 1, 12, 4)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    mask[..., 0:3] = False
    w = sc.attend(q, k, v, "landmark_attention(4)", mask=mask, need=("weights",)).weights
    assert (w[..., :4] == 0).all()
    torch.testing.assert_close(w[:, :, 4:].sum(-1), torch.ones(1, 1, 8, dtype=w.dtype))
    assert (w[:, :, :4] == 0).all()


@pytest.mark.parametrize("top", ["none", "1"])
def test_decoding_equals_the_whole_call(top: str) -> None:
    layer = sc.nn.Attention(16, 2, f"landmark_attention(4, top={top})").double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-12, rtol=0)


def test_padding_does_not_matter() -> None:
    q, k, v = qkv(2, 2, 30, 8)
    lengths = torch.tensor([30, 13])
    for x in (q, k, v):
        x[1, :, 13:] = math.nan
    for kernel in ("slab", "fetch"):
        found = sc.attend(q, k, v, "landmark_attention(4, top=2)", key_lengths=lengths, kernel=kernel)
        alone = sc.attend(*(x[1:, :, :13] for x in (q, k, v)), "landmark_attention(4, top=2)", kernel=kernel)
        torch.testing.assert_close(found[1:, :, :13], alone, atol=1e-12, rtol=0)


def test_a_replayed_choice_may_repeat_blocks_and_name_the_own_one() -> None:
    q, k, v = qkv(1, 1, 12, 4)
    index = torch.tensor([0, 1, 0, 2]).expand(1, 1, 12, 4)
    choice = Blocks(index, torch.ones_like(index, dtype=torch.bool), 4)
    a, b = (
        sc.attend(q, k, v, "landmark_attention(4, top=4)", selection=choice, kernel=n)
        for n in ("slab", "fetch")
    )
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_work_follows_the_blocks_that_are_fetched() -> None:
    q, k, v = qkv(1, 2, 2048, 16, dtype=torch.float32)
    dense, few = (
        flops(lambda t=t: sc.attend(q, k, v, t))
        for t in ("landmark_attention(32)", "landmark_attention(32, top=2)")
    )
    assert few < dense / 4
    assert sc.plan("landmark_attention(32, top=2)", (1, 2, 2048, 16)).kernel == "fetch"


def test_landmarks_stand_at_the_end_of_their_blocks() -> None:
    tokens = torch.arange(8).expand(2, 8)
    assert with_landmarks(tokens, 4, 99)[0].tolist() == [0, 1, 2, 99, 3, 4, 5, 99, 6, 7]
    assert with_landmarks(tokens[:, :2], 4, 99)[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="a block holds a token and its landmark, so at least 2, got 1"):
        with_landmarks(tokens, 1, 99)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(sc.MechanismError, match="block must be a whole number of at least 2, got 1"):
        sc.mechanism("landmark_attention(1)")
    with pytest.raises(sc.MechanismError, match="far=3 is for fetched blocks; give top"):
        sc.mechanism("landmark_attention(8, far=3)")
    with pytest.raises(sc.MechanismError, match=r"far must be a whole number .*of at least 1, got 0"):
        sc.mechanism("landmark_attention(8, top=2, far=0)")
    with pytest.raises(sc.MechanismError, match="grouped_softmax needs key order"):
        sc.mechanism("grouped_softmax(8)")
    with pytest.raises(sc.NotSupported, match=r"fetch: .*blocks of 4 keys for 1 queries meet groups of 8"):
        sc.plan(
            "causal + top_blocks(4, proxy=landmark_key) + chunk(8) + grouped_softmax(8)",
            (1, 1, 64, 8),
            kernel="fetch",
        )


BLOCK = 8
FETCH = f"landmark_attention({BLOCK}, top=2)"


def keys_found(length: int, steps: int, seed: int = 0, mechanism: str | None = None) -> tuple[float, float]:
    """Digits found at the trained length and at eight times that, by two layers; blocks come on top of `length`.

    Landmark models learn whole, then a third as many steps while they fetch two blocks; others stay as they are.
    """
    torch.manual_seed(seed)
    generator, task = torch.Generator().manual_seed(seed), Passkey(length, digits=1)

    def made(text: str) -> sc.nn.Transformer:
        return sc.nn.Transformer(task.vocab + 1, 32, 2, 2, text, positions="none")

    def batch(task: Passkey, size: int, g: torch.Generator) -> list[Tensor]:
        marks = (task.vocab, SILENT)
        return [with_landmarks(x, BLOCK, n) for x, n in zip(task.batch(size, g), marks, strict=True)]

    def learn(model: sc.nn.Transformer, steps: int, rate: float) -> None:
        def loss(step: int) -> Tensor:
            tokens, targets = batch(task, 16, generator)
            return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

        train(model.parameters(), loss, steps, rate)

    model = made(mechanism or f"landmark_attention({BLOCK})")
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)
    learn(model, steps, 5e-3)
    if mechanism is None:
        whole, model = model, made(FETCH)
        model.load_state_dict(whole.state_dict())
        learn(model, steps // 3, 2.5e-3)
    found = []
    for n in (length, 8 * length):
        tokens, targets = batch(Passkey(n, digits=1), 128, torch.Generator().manual_seed(seed + 1))
        with torch.no_grad():
            found.append(accuracy(model(tokens), targets))
    return found[0], found[1]


def share_read(length: int) -> float:
    """Of the tokens of a text: two blocks, the own one and all landmarks."""
    return (3 * BLOCK + length // BLOCK) / length


def test_a_passkey_at_eight_times_the_trained_length() -> None:
    near, far = keys_found(56, 210)
    assert share_read(512) <= 0.25
    assert near >= 0.95
    assert far >= 0.9
    assert keys_found(56, 210, mechanism=f"rope + window({3 * BLOCK})")[1] <= 0.35


@pytest.mark.slow
def test_a_passkey_in_1024_tokens_after_training_on_128() -> None:
    assert share_read(1024) <= 0.25
    assert keys_found(112, 240)[1] >= 0.9
