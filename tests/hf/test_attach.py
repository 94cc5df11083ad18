"""Mechanisms in transformers models: full attention changes nothing, others do what they say under every rule of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import saccade as sc  # noqa: E402
from hf.helpers import FAMILIES, SMALL, build, close, tokens  # noqa: E402
from saccade import hf  # noqa: E402

each_family = pytest.mark.parametrize("name", FAMILIES)


@each_family
def test_full_attention_changes_nothing(name: str) -> None:
    model, x = build(name), tokens()
    want = model(x).logits
    with hf.attach(model, "causal"):
        assert close(model(x).logits, want)
    assert torch.equal(model(x).logits, want)


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_honoured(name: str, side: str) -> None:
    model, x = build(name), tokens()
    mask = torch.ones_like(x)
    absent = slice(0, 7) if side == "left" else slice(13, 20)
    mask[0, absent] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    want = model(x, attention_mask=mask, position_ids=positions).logits
    with hf.attach(model, "causal"):
        got = model(x, attention_mask=mask, position_ids=positions).logits
    assert close(got[mask.bool()], want[mask.bool()])


@each_family
def test_generation_equals_the_model(name: str) -> None:
    model, x = build(name), tokens()
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    ask = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    want = model.generate(x, **ask)
    beams = model.generate(x, num_beams=3, **ask)
    with hf.attach(model, "causal"):
        assert torch.equal(model.generate(x, **ask), want)
        assert torch.equal(model.generate(x, num_beams=3, **ask), beams)


def test_generation_with_a_static_cache() -> None:
    model, x = build("llama"), tokens()
    ask = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(x, **ask)
    with hf.attach(model, "causal"):
        assert torch.equal(
            model.generate(x, cache_implementation="static", disable_compile=True, **ask), want
        )


def test_static_caches_keep_the_places_of_keys() -> None:
    model, x = build("llama"), tokens()
    ask = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with hf.attach(model, "window(4) + sink(2)"):
        want = model.generate(x, **ask)
        assert torch.equal(
            model.generate(x, cache_implementation="static", disable_compile=True, **ask), want
        )
        padded = torch.ones_like(x)
        padded[0, :4] = 0
        with pytest.raises(sc.NotSupported, match="where a key stands"):
            model.generate(
                x, attention_mask=padded, cache_implementation="static", disable_compile=True, **ask
            )


def test_steps_equal_reading_at_once() -> None:
    model, x = build("llama"), tokens(1, 30)
    with hf.attach(model, "window(5) + sink(2)"):
        whole = model(x).logits
        cache = transformers.DynamicCache()
        pieces = [model(part, past_key_values=cache).logits for part in x.split((11, 1, 1, 9, 8), dim=1)]
    assert close(torch.cat(pieces, 1), whole)
    assert not close(whole, model(x).logits)


def test_padding_moves_sinks_along() -> None:
    model, x = build("llama"), tokens(1, 24)
    with hf.attach(model, "window(5) + sink(2)"):
        alone = model(x).logits
        padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), x), 1)
        both = torch.cat((padded, tokens(1, 30, seed=5)))
        mask = torch.ones_like(both)
        mask[0, :6] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        got = model(both, attention_mask=mask, position_ids=positions).logits
    assert close(got[:1, 6:], alone)


def test_packed_sequences_do_not_meet() -> None:
    model, x = build("llama"), tokens(1, 20)
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    with hf.attach(model, "window(6)"):
        together = model(x, position_ids=positions, use_cache=False).logits
        apart = torch.cat((model(x[:, :8]).logits, model(x[:, 8:]).logits), 1)
    assert close(together, apart)


def test_a_window_equals_a_sliding_model() -> None:
    sliding, plain = build("mistral, sliding"), build("mistral")
    plain.load_state_dict(sliding.state_dict())
    x = tokens()
    with hf.attach(plain, "window(6)"):
        assert close(plain(x).logits, sliding(x).logits)


def test_causality_is_the_models_own() -> None:
    model, x = build("llama"), tokens()
    with hf.attach(model, "neighborhood(7)"):
        both = model(x).logits
    with hf.attach(model, "window(4)"):
        assert close(both, model(x).logits)


def test_layers_differ() -> None:
    model, x = build("llama"), tokens()
    own = model(x).logits
    with hf.attach(model, {1: "window(4)"}):
        one = model(x).logits
    with hf.attach(
        model,
        {
            "0-2": "causal",
        },
    ):
        none = model(x).logits
    assert close(none, own)
    assert not close(one, own)


def test_weights_are_recomputed_when_asked_for() -> None:
    model, x = build("llama"), tokens()
    want = model(x, output_attentions=True).attentions
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    padded = model(x, attention_mask=mask, output_attentions=True).attentions
    with hf.attach(model, "causal"):
        got = model(x, output_attentions=True).attentions
        left = model(x, attention_mask=mask, output_attentions=True).attentions
    assert all(close(a, b) for a, b in zip(got, want, strict=True))
    assert all(close(a[0, :, 5:], b[0, :, 5:]) for a, b in zip(left, padded, strict=True))


def test_compiled_models_break_around_attention() -> None:
    model, x = build("llama"), tokens()
    with hf.attach(model, "window(5) + sink(2)"):
        want = model(x).logits
        assert close(torch.compile(model, backend="eager")(x).logits, want)


def test_gradients_flow() -> None:
    model, x = build("llama"), tokens()
    model(x, labels=x).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with hf.attach(model.train(), "causal"):
        model(x, labels=x).loss.backward()
    for n, p in model.named_parameters():
        assert (p.grad - want[n]).abs().max() <= 2e-4 * want[n].abs().max() + 1e-8, n


def test_an_encoder_reads_both_sides() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False).eval()
    x = tokens()
    mask = torch.ones_like(x)
    mask[1, 12:] = 0
    want = model(x, attention_mask=mask).last_hidden_state
    with hf.attach(model, "full"):
        assert close(model(x, attention_mask=mask).last_hidden_state[mask.bool()], want[mask.bool()])
    with hf.attach(model, "neighborhood(5)"):
        near = model(x).last_hidden_state
        moved = x.clone()
        moved[:, -1] = 5
        assert torch.equal(model(moved).last_hidden_state[:, :10], near[:, :10])


@pytest.mark.parametrize(
    ("choice", "error", "says"),
    [
        ("linformer", (sc.MechanismError, sc.NotSupported), "."),
        ("nystromformer", (sc.MechanismError, sc.NotSupported), "."),
        ({7: "causal"}, sc.MechanismError, "layers 0 to 2"),
        ({0: "causal", "0-1": "causal"}, sc.MechanismError, "named twice"),
        ({"x": "causal"}, sc.MechanismError, "8-15"),
        ("causal + sink_logit", sc.NotSupported, "sink_logit"),
        ("routing_transformer", (sc.MechanismError, sc.NotSupported), "."),
        ("nothing", sc.MechanismError, "nothing"),
    ],
)
def test_bad_choices_are_refused(choice: Any, error: Any, says: str) -> None:
    model = build("llama")
    with pytest.raises(error, match=says):
        hf.attach(model, choice)
    assert model.config._attn_implementation == "eager"
    assert model(tokens()).logits.isfinite().all()


def test_what_cannot_be_honoured_is_refused() -> None:
    model = build("llama")
    with hf.attach(model, "causal"), pytest.raises(sc.NotSupported, match="already"):
        hf.attach(model, "causal")
    with pytest.raises(TypeError, match="PreTrainedModel"):
        hf.attach(torch.nn.Linear(2, 2), "causal")
    biased = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    )
    x = tokens()
    with pytest.raises(sc.NotSupported, match=r"bias|attention interface"), hf.attach(biased, "full"):
        biased(x, decoder_input_ids=x)
    drops = build("llama")
    for m in drops.modules():
        if hasattr(m, "attention_dropout"):
            m.attention_dropout = 0.1
    with hf.attach(drops.train(), "causal"), pytest.raises(sc.NotSupported, match="drops"):
        drops(x)


def test_a_sliding_cache_refuses_sinks() -> None:
    model, x = build("mistral, sliding"), tokens()
    with hf.attach(model, "window(4) + sink(2)"), pytest.raises(sc.NotSupported, match="DynamicCache"):
        model.generate(x, max_new_tokens=8, do_sample=False, eos_token_id=None)


def test_detach_gives_back() -> None:
    model, x = build("llama"), tokens()
    want = model(x).logits
    handle = hf.attach(model, "window(3)")
    hf.detach(model, "eager")
    assert torch.equal(model(x).logits, want)
    handle.detach()
    handle.detach()
    assert torch.equal(model(x).logits, want)
