"""S173, Multi-Token Attention: logits convolved over queries and keys, heads mixed, outputs normed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import Block
from saccade.parts.base import Sizes
from systems.helpers import below, dense, qkv, stepwise, train

HEADS, D = 4, 6
pytestmark = pytest.mark.system("S173")


def drawn(text: str) -> dict[str, Tensor]:
    """Weights of a mechanism, none of them at its starting value."""
    declared = sc.mechanism(text).weights(Sizes(HEADS, HEADS, D, D))
    return {n: torch.randn(w.shape, dtype=torch.float64) for n, w in declared.items()}


def written_out(
    q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor], exist: Tensor, group: int, norm: bool = True
) -> Tensor:
    """MTA pair by pair, with the kernel of the paper: the taps and the identity."""
    kernel = p["pair_conv"].clone()
    rows, taps = kernel.shape[1:]
    middle = (taps - 1) // 2
    kernel[:, 0, middle] += 1
    length, keys = q.shape[2], k.shape[2]
    s = torch.where(exist, q @ k.transpose(-1, -2) / math.sqrt(D), 0.0)
    w = torch.zeros_like(s)
    for h in range(HEADS):
        for i in range(length):
            z = torch.full((keys,), -torch.inf, dtype=q.dtype)
            for j in range(keys):
                if exist[i, j]:
                    z[j] = sum(
                        kernel[h, a, b] * s[0, h, i - a, j + b - middle]
                        for a in range(min(rows, i + 1))
                        for b in range(taps)
                        if 0 <= j + b - middle < keys
                    )
            w[0, h, i] = torch.softmax(z, 0) if exist[i].any() else 0
    mixed = torch.zeros_like(w)
    for h in range(HEADS):
        first = h - h % group
        for other in range(group):
            mixed[0, h] += p["head_mix"][h // group, h % group, other] * w[0, first + other]
    out = mixed @ v
    if not norm:
        return out
    return out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["out_norm"][:, None]


@pytest.mark.parametrize("kernel", ["slab", "reference"])
@pytest.mark.parametrize(("queries", "keys", "group"), [(6, 11, 2), (1, 1, 1), (3, 4, 4), (2, 1, 2)])
def test_every_path_equals_the_formula(queries: int, keys: int, group: int, kernel: str) -> None:
    q, k, v = qkv(1, HEADS, 20, D)
    text = f"causal + mta({queries}, keys={keys}, heads={group})"
    params = drawn(text)
    want = written_out(q, k, v, params, below(20), group)
    torch.testing.assert_close(
        sc.attend(q, k, v, text, params=params, kernel=kernel), want, atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("pairs", ["full", "window(7)", "window(4) + sink(2)", "causal + chunk(6)"])
def test_pairs_that_do_not_exist_count_as_zero(pairs: str) -> None:
    q, k, v = qkv(1, HEADS, 20, D)
    exist = sc.attend(0 * q, k, v, pairs, need=("weights",)).weights[0, 0] > 0
    text = f"{pairs} + pair_conv(3, keys=5) + head_mix(2)"
    params = drawn(text)
    want = written_out(q, k, v, params, exist, 2, norm=False)
    torch.testing.assert_close(sc.attend(q, k, v, text, params=params), want, atol=1e-10, rtol=0)


def test_slabs_with_a_halo_equal_the_whole_and_their_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, HEADS, 300, D))
    params = {n: x.requires_grad_() for n, x in drawn("mta").items()}
    inputs = (q, k, v, *params.values())
    found = [sc.attend(q, k, v, "causal + mta", params=params, kernel=x) for x in ("slab", "reference")]
    torch.testing.assert_close(*found, atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), inputs) for x in found]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_identity_kernels_are_plain_attention() -> None:
    q, k, v = qkv(2, HEADS, 150, D)
    text = "causal + pair_conv(6, keys=11) + head_mix(2)"
    declared = sc.mechanism(text).weights(Sizes(HEADS, HEADS, D, D))
    found = sc.attend(q, k, v, text, params={n: w.make().double() for n, w in declared.items()})
    torch.testing.assert_close(found, dense(q, k, v, below(150)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("t", [1, 9, 140])
def test_later_tokens_leave_earlier_outputs_exactly_alone(t: int) -> None:
    q, k, v = qkv(1, HEADS, 150, D)
    params = drawn("mta")
    later = (torch.arange(150) >= t)[:, None]
    moved = [torch.where(later, 50 * torch.randn_like(x), x) for x in (q, k, v)]
    a, b = (sc.attend(*x, "causal + mta", params=params)[:, :, :t] for x in ((q, k, v), moved))
    assert torch.equal(a, b)


@pytest.mark.parametrize("text", ["causal + mta", "window(9) + mta(3, keys=4)", "causal + mta(1, keys=5)"])
def test_decoding_equals_the_whole_call_and_keeps_the_last_queries(text: str) -> None:
    layer = sc.nn.Attention(24, HEADS, text).double()
    with torch.no_grad():
        for name in layer.weight_names:
            layer.get_parameter(name).normal_()
    x = torch.randn(2, 60, 24, dtype=torch.float64)
    found, held = stepwise(layer, x)
    torch.testing.assert_close(found, layer(x), atol=1e-9, rtol=0)
    if text.startswith("window"):
        assert max(held) == max(held[:40])
    first, state = layer.step(x[:, :11], layer.init_state(2))
    rest, _ = layer.step(x[:, 11:], state)
    torch.testing.assert_close(torch.cat((first, rest), 1), layer(x), atol=1e-9, rtol=0)


def test_what_does_not_go_with_ties_between_pairs_and_heads_is_refused() -> None:
    q, k, v = qkv(1, HEADS, 8, D)
    params = drawn("mta")
    with pytest.raises(sc.NotSupported, match="out_norm changes the output after the mix"):
        sc.attend(q, k, v, "causal + mta", params=params, need=("lse",))
    bare = {n: x for n, x in params.items() if n != "out_norm"}
    with pytest.raises(sc.NotSupported, match="no log-denominator"):
        sc.attend(q, k, v, "causal + pair_conv + head_mix", params=bare, need=("lse",))
    with pytest.raises(ValueError, match=r"head_mix\(3\) needs a multiple of 3 heads, got 4"):
        sc.nn.Attention(8, 4, "head_mix(3)")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(sc.NotSupported, match="keeps its last 5 queries"):
        sc.attend(q, k, v, "causal + mta", params=params, mask=mask, need=("out", "state"))


BLOCKS, WIDTH, LETTERS = 4, 5, 12


def blocks_of_letters(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four blocks of five letters and two letters of one block, (n, 22), and the only block that has both, (n,)."""
    letters = torch.rand(size, BLOCKS, LETTERS, generator=generator).argsort(-1)[..., :WIDTH]
    target = torch.randint(BLOCKS, (size,), generator=generator)
    places = torch.rand(size, WIDTH, generator=generator).argsort(1)[:, :2]
    asked = letters[torch.arange(size), target].gather(1, places)
    both = (letters[..., None] == asked[:, None, None]).any(2).all(-1)
    only = both.sum(1) == 1
    return torch.cat((letters.flatten(1), asked), 1)[only], target[only]


class Finder(nn.Module):
    """One block over letters that know the block they are in, read at the last of the letters asked for."""

    def __init__(self, mechanism: str, dim: int = 32) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, dim), nn.Embedding(BLOCKS + 2, dim)
        self.block = Block(dim, 2, sc.mechanism(mechanism))
        self.norm, self.answer = nn.LayerNorm(dim), nn.Linear(dim, BLOCKS)

    def forward(self, tokens: Tensor) -> Tensor:
        asked = torch.tensor([BLOCKS, BLOCKS + 1])
        places = torch.cat((torch.arange(BLOCKS).repeat_interleave(WIDTH), asked))
        return self.answer(self.norm(self.block(self.letters(tokens) + self.places(places))[:, -1]))


def error(mechanism: str, steps: int, rate: float) -> float:
    """Share of blocks that a trained finder gets wrong."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Finder(mechanism)

    def loss(step: int) -> Tensor:
        tokens, block = blocks_of_letters(80, generator)
        return F.cross_entropy(model(tokens), block)

    train(model.parameters(), loss, steps, rate)
    tokens, block = blocks_of_letters(2000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(tokens).argmax(-1) != block).float().mean())


def test_the_block_of_two_letters_is_found_by_mta_and_not_by_attention_of_the_same_size() -> None:
    mta, plain = (error(m, steps=700, rate=1e-2) for m in ("causal + mta(2, keys=9)", "causal"))
    assert mta <= 0.05
    assert plain >= 3 * mta
    assert plain >= 0.15
