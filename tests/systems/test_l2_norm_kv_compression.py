"""S073, L2 norm: keys of small norm stay, and whether that is a good choice is measured, not assumed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.cache import LayerCache, policy, premise
from systems import small_llama
from systems.helpers import qkv
from systems.small_llama import CORPUS, READ, TOLD, text_loss, transformers

from saccade import hf  # isort: skip

pytestmark = pytest.mark.system("S073")


def read(text: str, q: Tensor, k: Tensor, v: Tensor, layer: int = 0, layers: int = 1) -> LayerCache:
    cache = LayerCache(policy(text), layer, layers)
    cache.append(k, v)
    cache.attend(q)
    cache.compress(q)
    return cache


@pytest.mark.parametrize(("budget", "sink", "recent"), [(7, 0, 0), (12, 2, 5), (50, 4, 16)])
def test_the_kept_set_equals_brute_force(budget: int, sink: int, recent: int) -> None:
    n = 60
    q, k, v = qkv(2, 4, n, 8, kv=2)
    cache = read(f"l2_norm(keep={budget}, sink={sink}, recent={recent})", q, k, v)
    assert cache.kept is not None
    places = cache.kept.padded()[2].view(2, 2, budget)
    for sample in range(2):
        for head in range(2):
            fixed = {*range(sink), *range(n - recent, n)}
            norms = {j: sum(float(x) ** 2 for x in k[sample, head, j]) for j in range(n) if j not in fixed}
            want = sorted(fixed | set(sorted(norms, key=norms.__getitem__)[: budget - len(fixed)]))
            assert places[sample, head].tolist() == want


def test_a_budget_of_all_is_the_full_cache_bit_for_bit() -> None:
    q, k, v = qkv(2, 4, 41, 8, kv=2, dtype=torch.float32)
    for text in ("l2_norm(keep=41)", "l2_norm(keep=64)", "l2_norm(keep=1.0)"):
        cache = read(text, q[:, :, :40], k[:, :, :40], v[:, :, :40])
        assert cache.kept is not None
        assert torch.equal(cache.kept.keys.view(2, 2, 40, 8), k[:, :, :40])
        assert torch.equal(cache.kept.values.view(2, 2, 40, 8), v[:, :, :40])
    model, x = small_llama.llama(64).eval(), torch.randint(64, (2, 50))
    ask: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    full = model.generate(x, **ask)
    with hf.compress(model, "l2_norm(keep=1000)"):
        assert torch.equal(model.generate(x, **ask), full)


def test_the_first_layers_may_keep_all() -> None:
    q, k, v = qkv(1, 4, 60, 8, kv=2)
    text = "l2_norm(keep=20, skip=2)"
    assert [read(text, q, k, v, n, 4).counts for n in range(4)] == [(60, 60)] * 2 + [(20, 20)] * 2
    with pytest.raises(sc.MechanismError, match="skip is a number of layers"):
        policy("l2_norm(skip=-1)")


def drawn_to_small_keys(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that stand against the direction of all keys, so that the smallest keys get the most weight."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 16, generator=generator) for h in (4, 2, 2))
    size = 2 + 3 * torch.rand(2, 2, n, 1, generator=generator)
    k = k / k.norm(dim=-1, keepdim=True)
    k[..., 0] = 3
    return q * 0.3 - torch.eye(16)[0] * 4, k / k.norm(dim=-1, keepdim=True) * size, v


def test_where_the_premise_holds_it_is_said_and_the_choice_beats_chance() -> None:
    q, k, v = drawn_to_small_keys(96, seed=0)
    found = premise([(q, k), (q, k)])
    assert found.rho.shape == (2, 2)
    assert found.mean > 0.8
    assert found.holds
    assert "holds" in str(found)
    full = sc.attend(q[:, :, -1:], k, v, "full")
    wrong = []
    for name in ("l2_norm", "at_random"):
        cache = read(f"{name}(keep=48, sink=0, recent=1)", q, k, v)
        assert cache.kept is not None
        made = cache.kept.read(q[:, :, -1:])
        assert made is not None
        wrong.append(float((made[0] - full).norm()))
    assert wrong[0] < 0.5 * wrong[1]


def test_the_correlation_is_spearmans_of_weight_over_uniform_weight() -> None:
    q, k, _ = qkv(1, 4, 30, 8, kv=2)
    received = torch.zeros(2, 30, dtype=torch.float64)
    even = torch.zeros(30, dtype=torch.float64)
    for t in range(30):
        even[: t + 1] += 1 / (t + 1)
        for head in range(4):
            weights = torch.softmax(k[0, head // 2, : t + 1] @ q[0, head, t] / 8**0.5, 0)
            received[head // 2, : t + 1] += weights
    found = premise([(q, k)])
    for g in range(2):
        a = (-k[0, g].norm(dim=-1)).argsort().argsort().tolist()
        b = (received[g] / even).argsort().argsort().tolist()
        want = 1 - 6 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (30 * (30**2 - 1))
        assert float(found.rho[0, g]) == pytest.approx(want, abs=1e-6)


def tells_the_truth(steps: int) -> None:
    """The report against the loss at half the budget: where it says that the premise holds, the choice beats chance."""
    model = small_llama.of_text(steps)
    rows = CORPUS.windows(READ + TOLD)[:128]
    found = hf.premise(model, rows[:32, :READ])
    assert not found.alike.any()
    chosen, drawn = (
        text_loss(model, f"{n}(keep=0.5, sink=2, recent=4)", rows) for n in ("l2_norm", "at_random")
    )
    if found.mean > 0.2:
        assert found.holds
        assert chosen < drawn
    else:
        assert not found.holds
        assert "fails" in str(found)
        assert chosen > drawn  # and so it is: a negative correlation, and a choice worse than chance


def test_a_model_trained_here() -> None:
    tells_the_truth(250)


@pytest.mark.slow
def test_a_model_trained_for_longer() -> None:
    tells_the_truth(1600)


def test_models_that_normalise_keys_are_warned_of() -> None:
    q, k, v = qkv(1, 4, 60, 8, kv=2, dtype=torch.float32)
    alike = k / k.norm(dim=-1, keepdim=True)
    with pytest.warns(UserWarning, match="all the same norm"):
        read("l2_norm(keep=30)", q, alike, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read("l2_norm(keep=30)", q, k, v)
        read("l2_norm(keep=60)", q, alike, v)
    found = premise([(q, alike)])
    assert found.alike.all()
    assert not found.holds
    assert "norms all alike" in str(found)
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model, x = transformers.Qwen3ForCausalLM(config).eval(), torch.randint(64, (1, 60))
    said = hf.premise(model, x)
    assert said.alike.all()
    assert "fails" in str(said)
    with hf.compress(model, "l2_norm(keep=30)"), pytest.warns(UserWarning, match="normalise its keys"):
        model.generate(x, max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_padding_takes_no_part_in_the_report() -> None:
    model, x = small_llama.llama(64).eval(), torch.randint(64, (2, 40))
    mask = torch.ones_like(x)
    mask[:, :9] = 0
    padded = hf.premise(model, x, mask)
    alone = hf.premise(model, x[:, 9:])
    torch.testing.assert_close(padded.rho, alone.rho, atol=0.02, rtol=0)
    torch.testing.assert_close(padded.spread, alone.spread, atol=1e-5, rtol=1e-4)


def test_bad_questions_are_refused() -> None:
    q, k, _ = qkv(1, 2, 8, 4)
    with pytest.raises(ValueError, match="at least one layer"):
        premise([])
    with pytest.raises(ValueError, match="same text"):
        premise([(q[:, :, :3], k)])
    with pytest.raises(ValueError, match="at least two tokens"):
        hf.premise(small_llama.llama(64), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(TypeError, match="PreTrainedModel"):
        hf.premise(torch.nn.Linear(2, 2), torch.zeros(1, 8, dtype=torch.long))
