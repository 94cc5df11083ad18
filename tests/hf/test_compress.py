"""Caches on a budget in models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import saccade as sc  # noqa: E402
from hf.helpers import FAMILIES, build, close, tokens  # noqa: E402
from saccade import hf  # noqa: E402

CACHED = [n for n in FAMILIES if not any(w in n for w in ("sliding", "gemma2", "oss"))]
POLICIES = ["streaming_llm", "l2_norm", "snapkv", "tova", "h2o", "adakv", "at_random", "a2sf"]
ASK: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("name", CACHED)
def test_keeping_all_generates_the_same(name: str) -> None:
    model, x = build(name), tokens()
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    for more in ({}, {"attention_mask": mask}, {"num_beams": 3}, {"num_beams": 2, "attention_mask": mask}):
        want = model.generate(x, **ASK, **more)
        with hf.compress(model, "snapkv(keep=1.0)", every=4):
            assert torch.equal(model.generate(x, **ASK, **more), want)
    assert torch.equal(model.generate(x, **ASK), model.generate(x, **ASK))


@pytest.mark.parametrize("text", POLICIES)
def test_budgets_hold_while_generating(text: str) -> None:
    model, x = build("llama"), tokens(2, 60)
    with hf.compress(model, f"{text}(keep=24, sink=2, recent=8)", every=4) as held:
        made = model.generate(x, **(ASK | {"max_new_tokens": 30}))
        assert made.shape == (2, 90)
        assert held.cache is not None
        assert held.cache.get_seq_length() == 89
        for counts in held.cache.counts:
            assert len(counts) == 4
            assert sum(counts) <= 4 * (24 + 4)
        full = 89 * 2 * 2 * 12 * 2 * 4 * 3
        assert held.cache.nbytes < 0.55 * full


def test_dropped_keys_matter_and_positions_stay() -> None:
    """With a window's policy, logits equal those of the same keys under a mask, at their positions in the text."""
    model, x = build("llama"), tokens(1, 40)
    with hf.compress(model, "streaming_llm(keep=14, sink=4, recent=10)") as held:
        cache = held.new_cache()
        model(x[:, :30], past_key_values=cache)
        got = model(x[:, 30:31], past_key_values=cache).logits
    with hf.attach(model, "causal"):
        before = transformers.DynamicCache()
        model(x[:, :30], past_key_values=before)
        mask = torch.ones(1, 1, 1, 31, dtype=torch.bool)
        mask[..., 4:20] = False
        want = model(
            x[:, 30:31], past_key_values=before, attention_mask=mask, position_ids=torch.tensor([[30]])
        ).logits
    assert close(got, want)


def test_several_turns_and_pieces() -> None:
    model, x = build("llama"), tokens(1, 64)
    with hf.compress(model, "snapkv(keep=1.0)") as held:
        whole = model(x).logits
        cache = held.new_cache()
        pieces = [model(part, past_key_values=cache).logits for part in x.split(16, 1)]
        assert close(torch.cat(pieces, 1), whole)
        assert cache.get_seq_length() == 64
    with hf.compress(model, "snapkv(keep=20, recent=8)") as held:
        cache = held.new_cache()
        for part in x.split(16, 1):
            model(part, past_key_values=cache)
            assert max(max(c) for c in cache.counts) <= 20


def test_prefill_in_pieces_by_generate() -> None:
    model, x = build("llama"), tokens(1, 50)
    want = model.generate(x, **ASK)
    with hf.compress(model, "snapkv(keep=1.0)"):
        assert torch.equal(model.generate(x, prefill_chunk_size=16, **ASK), want)


def test_what_cannot_be_kept_is_refused() -> None:
    x = tokens()
    sliding = build("mistral, sliding")
    with hf.compress(sliding, "snapkv"), pytest.raises(sc.NotSupported, match="window of 6"):
        sliding.generate(x, **ASK)
    capped = build("gemma2")
    with hf.compress(capped, "snapkv"), pytest.raises(sc.NotSupported, match="layer 0"):
        capped.generate(x, **ASK)
    model = build("llama")
    cache = transformers.DynamicCache()
    model(x, past_key_values=cache)
    with hf.compress(model, "snapkv") as held:
        with pytest.raises(sc.NotSupported, match="no policy has seen"):
            model(x, past_key_values=cache)
        mine = held.new_cache()
        model(x, past_key_values=mine)
        with pytest.raises(sc.NotSupported, match="cropped"):
            mine.layers[0].crop(-1)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        hf.compress(torch.nn.Linear(2, 2), "snapkv")
    with pytest.raises(sc.MechanismError, match="there are"):
        hf.compress(model, "nothing")
    bert = transformers.BertModel(
        transformers.BertConfig(num_hidden_layers=1, vocab_size=97, hidden_size=48, num_attention_heads=4)
    )
    with pytest.raises(sc.NotSupported, match="causal"):
        hf.compress(bert, "snapkv")
