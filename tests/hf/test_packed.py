"""Packed caches in models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf.helpers import build, tokens  # noqa: E402
from hf.test_compress import ASK, CACHED  # noqa: E402
from saccade import hf  # noqa: E402
from saccade.cache import Kivi, Oscar  # noqa: E402

EIGHT = "kivi(bits=8, group=8, residual=8)"


def last_logits(model: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of six tokens one by one after the others, through whatever cache the model makes."""
    made = model.generate(
        x,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_logits=True,
        **(ASK | {"max_new_tokens": 6}),
    )
    return torch.stack(made.logits)


@pytest.mark.parametrize("name", CACHED)
def test_eight_bits_generate_nearly_the_same(name: str) -> None:
    model, x = build(name), tokens(2, 40)
    mask = torch.ones_like(x)
    mask[0, :13] = 0
    for given in (None, mask):
        want = last_logits(model, x, given)
        with hf.compress(model, EIGHT, every=3) as held:
            got = last_logits(model, x, given)
        assert held.cache is not None
        assert all(layer.store.packed.counts[-1] >= 24 for layer in held.cache.layers)
        assert (got - want).abs().amax() < 0.1 * want.std()
        assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_error_falls_with_bits() -> None:
    model, x = build("llama"), tokens(2, 60)
    want = model(x).logits

    def error(bits: int) -> float:
        with hf.compress(model, Kivi(bits, group=8, residual=8)) as held:
            cache = held.new_cache()
            model(x[:, :52], past_key_values=cache)
            got = model(x[:, 52:], past_key_values=cache).logits
        return float((got - want[:, 52:]).norm() / want[:, 52:].norm())

    errors = [error(bits) for bits in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 8 * errors[2] > 0
    assert errors[2] < 0.02


def test_beams_and_left_padding() -> None:
    model, x = build("llama"), tokens(2, 40)
    mask = torch.ones_like(x)
    mask[0, :13] = 0
    for more in ({"num_beams": 3}, {"num_beams": 2, "attention_mask": mask}):
        want = model.generate(x, **ASK, **more)
        with hf.compress(model, EIGHT, every=4):
            assert torch.equal(model.generate(x, **ASK, **more), want)


@pytest.mark.parametrize("text", ["snapkv(keep=24)", "adakv(keep=24)", "h2o(keep=24)"])
def test_policies_with_a_format(text: str) -> None:
    """One choice after the text, as without a format; the same tokens with eight bits, in fewer bytes."""
    model, x = build("llama"), tokens(2, 60)
    with hf.compress(model, text) as plain:
        want = model.generate(x, **ASK)
    with hf.compress(model, f"{text} + {EIGHT}") as packed:
        assert torch.equal(model.generate(x, **ASK), want)
    assert plain.cache is not None
    assert packed.cache is not None
    assert packed.cache.counts == plain.cache.counts
    assert packed.cache.nbytes < plain.cache.nbytes


def test_bytes_of_a_model_are_those_of_the_formula() -> None:
    model, x = build("llama"), tokens(2, 76)
    with hf.compress(model, "kivi(bits=2, group=16, residual=10)") as held:
        cache = held.new_cache()
        model(x, past_key_values=cache)
    packed = 64 * (12 + 12) * 2 // 8 + 4 * (64 // 16 * 12 + 64)  # twelve channels of a value are one group
    plain = 12 * (12 + 12) * 4 + 12 * 8
    assert cache.nbytes == 3 * 2 * 2 * (packed + plain + 4)


def test_several_turns_and_pieces() -> None:
    model, x = build("llama"), tokens(1, 64)
    whole = model(x).logits
    with hf.compress(model, EIGHT) as held:
        cache = held.new_cache()
        got = torch.cat([model(part, past_key_values=cache).logits for part in x.split(16, 1)], 1)
    assert cache.get_seq_length() == 64
    assert (got - whole).norm() < 0.02 * whole.norm()


@pytest.mark.system("S278")
def test_bases_found_offline_serve_other_texts() -> None:
    model, x = build("llama"), tokens(2, 60)
    small = Oscar(bits=8, group=8, residual=8, sink=4)
    rule = hf.calibrate(model, tokens(2, 60, seed=7), small)
    assert rule.offline is not None
    assert len(rule.offline) == 3
    want = model.generate(x, **ASK)
    for made in (rule, small):
        with hf.compress(model, made) as held:
            assert torch.equal(model.generate(x, **ASK), want)
            assert held.cache is not None
            same = [
                layer.store.bases is given
                for layer, given in zip(held.cache.layers, rule.offline, strict=True)
            ]
            assert all(same) if made is rule else not any(same)
    with pytest.raises(ValueError, match="turns nothing"):
        hf.calibrate(model, x, Oscar(rotation="none"))
