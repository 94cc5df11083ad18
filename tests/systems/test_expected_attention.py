"""S170, Expected Attention: keys stay that later queries are expected to weigh most, from the moments of those before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.cache import LayerCache, Moments, Rotation, policy
from saccade.cache.expected import log_expected
from saccade.tasks.recall import SILENT, accuracy
from systems import small_llama
from systems.helpers import FRESH, qkv, train
from systems.small_llama import transformers

from saccade import hf  # isort: skip

pytestmark = pytest.mark.system("S170")

FREQUENCIES = 10000.0 ** (-torch.arange(3) / 3)  # of 6 of 8 channels


def matrix(position: float, d: int = 8) -> Tensor:
    """The rotation at a position, written out."""
    turn = torch.eye(d, dtype=torch.float64)
    for m, w in enumerate(FREQUENCIES.double().tolist()):
        c, s = math.cos(position * w), math.sin(position * w)
        turn[m, m], turn[m, m + 3], turn[m + 3, m], turn[m + 3, m + 3] = c, -s, s, c
    return turn


def read(
    text: str, q: Tensor, k: Tensor, v: Tensor, cuts: list[int], turns: Rotation | None = None
) -> LayerCache:
    cache = LayerCache(policy(text), every=5, rotation=turns)
    for qs, ks, vs in zip(*(x.split(cuts, 2) for x in (q, k, v)), strict=True):
        cache.append(ks, vs)
        cache.attend(qs)
        cache.observe(qs)
        if qs.shape[2] > 1 or cache.due:
            cache.compress(qs)
    return cache


@pytest.mark.parametrize("rotated", [False, True])
def test_the_closed_form_is_the_mean_of_exponentials(rotated: bool) -> None:
    """Within 3 standard errors of 400,000 normal queries, each turned by the mean of the next 20 rotations."""
    d, draws = 8, 400_000
    k, mean, root = torch.randn(6, d).double(), torch.randn(d).double(), torch.randn(d, d).double() / 2
    q = mean + torch.randn(draws, d, dtype=torch.float64) @ root.T
    turn = torch.eye(d, dtype=torch.float64)
    if rotated:
        turn = torch.stack([matrix(100 + t) for t in range(20)]).mean(0)
    found = log_expected(k, turn @ mean, turn @ root @ root.T @ turn.T).exp()
    drawn = (q @ turn.T @ k.T / d**0.5).exp()
    assert ((found - drawn.mean(0)).abs() < 3 * drawn.std(0) / draws**0.5).all()
    torch.testing.assert_close(log_expected(k, turn @ mean), k @ turn @ mean / d**0.5)


@pytest.mark.parametrize("cuts", [[40], [1] * 40, [13, 1, 1, 25]])
def test_moments_are_those_of_queries_before_their_rotation(cuts: list[int]) -> None:
    plain, k, v = qkv(2, 4, 40, 8, kv=2)
    plain = 3 + plain @ torch.randn(8, 8).double()
    q = torch.stack([plain[:, :, t] @ matrix(t).T for t in range(40)], 2)
    text = "expected_attention(keep=1.0, sink=3)"
    moments = read(text, *(x.float() for x in (q, k, v)), cuts, Rotation(FREQUENCIES)).moments
    assert moments is not None
    used = plain[:, :, 3:]
    assert moments.count.tolist() == [37, 37]
    torch.testing.assert_close(moments.mean.double(), used.mean(2), atol=1e-5, rtol=1e-5)
    for sample in range(2):
        for head in range(4):
            want = torch.cov(used[sample, head].T, correction=0)
            torch.testing.assert_close(moments.covariance[sample, head].double(), want, atol=1e-4, rtol=1e-4)


def test_padding_and_sinks_are_not_counted() -> None:
    q = torch.randn(2, 3, 12, 4)
    there = torch.ones(2, 12, dtype=torch.bool)
    there[0, :7] = False
    moments = Moments(skip=2)
    moments.add(q.masked_fill(~there[:, None, :, None], torch.nan), 0, there)
    assert moments.count.tolist() == [3, 10]
    torch.testing.assert_close(moments.mean[0], q[0, :, 9:].mean(1))
    torch.testing.assert_close(moments.mean[1], q[1, :, 2:].mean(1))
    moments.select([1, 1, 0])
    assert moments.count.tolist() == [10, 10, 3]
    short = Moments(skip=5)
    short.add(q[:, :, :4], 0)
    assert not short.mean.any()
    assert not short.covariance.any()


@pytest.mark.parametrize("options", ["", "eps=0.02", "covariance=False", "values=False"])
def test_scores_equal_the_formula(options: str) -> None:
    n, ahead = 30, 7
    plain, k, v = qkv(1, 4, n, 8, kv=2)
    q = torch.stack([plain[:, :, t] @ matrix(t).T for t in range(n)], 2)
    text = f"expected_attention(keep=12, sink=2, recent=3, ahead={ahead}{options and ', ' + options})"
    cache = read(text, *(x.float() for x in (q, k, v)), [n], Rotation(FREQUENCIES))
    turn = sum(matrix(n + t) for t in range(ahead)) / ahead
    assert cache.kept is not None
    for g in range(2):
        shares = []
        for head in (2 * g, 2 * g + 1):
            used = plain[0, head, 2:]
            mu, sigma = turn @ used.mean(0), turn @ torch.cov(used.T, correction=0) @ turn.T
            z = []
            for j in range(n):
                x = k[0, g, j]
                z.append(x @ mu / 8**0.5 + (0 if "cov" in options else x @ sigma @ x / 16))
            shares.append(F.pad(torch.stack(z)[2:].softmax(0), (2, 0)))
        score = (shares[0] + shares[1]) / 2 + (0.02 if "eps" in options else 0)
        if "values" not in options:
            score = score * v[0, g].norm(dim=-1)
        score[:2] = score[-3:] = torch.inf
        want = sorted(score.argsort(descending=True)[:12].tolist())
        assert cache.kept.padded()[2][g].tolist() == want


@pytest.mark.parametrize("rope", ["default", "yarn", "partial", "none"])
def test_keeping_all_is_the_model_and_its_queries_are_known(rope: str) -> None:
    """Nothing dropped, nothing changed; and the moments are those of what the projection makes, up to the model's own factor."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    if rope == "partial":
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**shape))
    elif rope == "none":
        model = transformers.OPTForCausalLM(
            transformers.OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=48, do_layer_norm_before=True)
        )
    else:
        if rope == "yarn":
            more = {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            }
            shape |= {"rope_parameters": more}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_key_value_heads=2))
    model = model.eval()
    x = torch.randint(3, 64, (2, 40))
    ask: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(x, **ask)
    made: list[Tensor] = []
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("q_proj"))
    hook = module.register_forward_hook(lambda _, __, out: made.append(out))
    with hf.compress(model, "expected_attention(keep=1.0, sink=0)") as held:
        assert torch.equal(model.generate(x, **ask), want), name
        assert held.cache is not None
        moments = held.cache.layers[0].store.moments
    hook.remove()
    beams = model.generate(x, num_beams=3, **ask)
    with hf.compress(model, "expected_attention(keep=1.0)", every=3):
        assert torch.equal(model.generate(x, num_beams=3, **ask), beams)
    factor = model.model.rotary_emb.attention_scaling if rope == "yarn" else 1.0
    assert (factor > 1) == (rope == "yarn")
    plain = torch.cat(made, 1).unflatten(-1, (4, 12)).transpose(1, 2) * factor
    torch.testing.assert_close(moments.mean, plain.mean(2), atol=1e-5, rtol=1e-4)
    apart = plain - plain.mean(2, keepdim=True)
    torch.testing.assert_close(moments.covariance, apart.mT @ apart / plain.shape[2], atol=1e-5, rtol=1e-4)


def test_padding_changes_no_choice_but_the_horizon() -> None:
    """A shift of all positions undoes itself: a padded text keeps the tokens that it keeps alone."""
    model, x = small_llama.llama(64).eval(), torch.randint(64, (1, 60))
    padded, mask = F.pad(x, (9, 0)), F.pad(torch.ones_like(x), (9, 0))
    found = []
    for text, given, told in (("keep=20", x, None), ("keep=20", padded, mask)):
        with hf.compress(model, f"expected_attention({text})") as held:
            cache = held.new_cache()
            model.generate(
                given,
                attention_mask=told,
                past_key_values=cache,
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=0,
            )
            found.append([layer.store.kept.positions for layer in cache.layers])
    for alone, shifted in zip(*found, strict=True):
        assert torch.equal(alone, shifted - 9)


def test_heads_may_share_a_budget() -> None:
    """What heads keep follows their scores; the sum is that of equal budgets, and each head keeps its part."""
    q, k, v = qkv(1, 4, 80, 8, kv=2, dtype=torch.float32)
    k[:, 0] *= 0.1  # evenly read, so many keys of middling worth
    k[:, 1] *= 3
    even = read("expected_attention(keep=30, sink=2, recent=4)", q, k, v, [80])
    free = read("expected_attention(keep=30, sink=2, recent=4, floor=0.4)", q, k, v, [80])
    assert even.counts == (30, 30)
    assert sum(free.counts) == 60
    assert min(free.counts) >= 12
    assert free.counts[0] > free.counts[1]


PLACES, READ = 3, 64


def passkey(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A passkey early in random filler, asked for digit by digit at random places after it, and once more at the end.

    A digit's token tells its place, a question's token the place that it asks for; answers are not fed back.
    """
    digits, mark, filler = 10 * PLACES, 10 * PLACES, 11 * PLACES + 1
    key = torch.randint(10, (size, PLACES), generator=generator) + 10 * torch.arange(PLACES)
    start = torch.randint(READ - 24, (size, 1), generator=generator)
    tokens = filler + torch.randint(8, (size, READ + PLACES), generator=generator)
    place = torch.randint(PLACES, tokens.shape, generator=generator)
    asks = torch.rand(tokens.shape, generator=generator) < 0.15
    place[:, READ:], asks[:, READ:] = torch.arange(PLACES), True
    asks &= torch.arange(READ + PLACES) > start + PLACES
    tokens = torch.where(asks, digits + 1 + place, tokens)
    tokens.scatter_(1, start, mark)
    tokens.scatter_(1, start + 1 + torch.arange(PLACES), key)
    return tokens, torch.where(asks, key.gather(1, place), SILENT)


@torch.no_grad()
def right(model: Any, text: str, tokens: Tensor, targets: Tensor) -> float:
    """Accuracy of the last questions, after a policy has chosen from what was read before them."""
    with hf.compress(model, text) as held:
        cache = held.new_cache()
        model(tokens[:, :READ], past_key_values=cache)
        return accuracy(model(tokens[:, READ:], past_key_values=cache).logits, targets[:, READ:])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_passkey_outlives_half_of_the_cache() -> None:
    model, generator = small_llama.llama(11 * PLACES + 9), torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        tokens, targets = passkey(32, generator)
        return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, 180, rate=5e-3)
    model.eval().requires_grad_(False)
    asked = passkey(256, torch.Generator().manual_seed(FRESH))
    found = {
        name: right(model, f"{name}(keep=0.5, sink=2, recent=4)", *asked)
        for name in ("expected_attention", "at_random", "streaming_llm")
    }
    assert right(model, "expected_attention(keep=1.0)", *asked) > 0.98
    assert found["expected_attention"] > 0.95
    assert found["expected_attention"] >= found["at_random"] + 0.2
    assert found["expected_attention"] >= found["streaming_llm"]
    assert right(model, "expected_attention(keep=0.25, sink=2, recent=4)", *asked) > 0.95
    shared = right(model, "expected_attention(keep=0.5, sink=2, recent=4, floor=0.2)", *asked)
    assert shared > 0.95


def test_what_it_cannot_know_is_refused() -> None:
    q, k, v = qkv(1, 2, 20, 8, dtype=torch.float32)
    cache = LayerCache(policy("expected_attention"))
    cache.append(k, v)
    with pytest.raises(sc.MechanismError, match="needs the queries of all tokens"):
        cache.compress(q)
    for text in ("ahead=0", "eps=-1.0", "floor=1.5"):
        with pytest.raises(sc.MechanismError, match="ahead is at least 1"):
            policy(f"expected_attention({text})")
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    turns = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    moving = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, rope_parameters=turns))
    with pytest.raises(sc.NotSupported, match="dynamic"):
        hf.compress(moving, "expected_attention")
    paired = transformers.CohereForCausalLM(transformers.CohereConfig(**shape))
    with pytest.raises(sc.NotSupported, match="pairs others"):
        hf.compress(paired, "snapkv | expected_attention")
    hf.compress(paired, "snapkv").remove()
