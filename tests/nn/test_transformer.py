"""Decoder, encoder and encoder-decoder around any mechanism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.nn import Encoder, EncoderDecoder, Transformer

VOCAB = 11


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape)


def decoder(text: str) -> Transformer:
    return Transformer(VOCAB, dim=16, depth=2, heads=4, mechanism=text, max_length=20).eval()


CAUSAL = [
    "causal",
    "full",
    "window(4)",
    "gqa(2) + rope + causal",
    "alibi",
    "moba(block=4, top=1)",
    "linear",
    "performer_favor(8)",
    "neighborhood(5)",
    "by_head(window(3), linear)",
    "mix(full, linear)",
    "additive(3)",
    "aaren",
]


@pytest.mark.parametrize("text", CAUSAL)
def test_steps_equal_forward(text: str) -> None:
    model, x = decoder(text), tokens(2, 15)
    with torch.no_grad():
        want = model(x)
        states, logits = model.init_state(2), []
        for piece in (x[:, :6], *x[:, 6:].split(1, dim=1)):
            y, states = model.step(piece, states)
            logits.append(y)
    torch.testing.assert_close(torch.cat(logits, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", CAUSAL)
def test_no_token_sees_a_later_one(text: str) -> None:
    model, x = decoder(text), tokens(1, 15)
    other = x.clone()
    other[:, 9:] = (other[:, 9:] + 1) % VOCAB
    with torch.no_grad():
        a, b = model(x), model(other)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-3)


@pytest.mark.parametrize("text", ["causal", "window(4)", "linear", "moba(block=4, top=1)"])
def test_padding_after_a_sample_does_not_change_its_logits(text: str) -> None:
    model, x = decoder(text), tokens(2, 15)
    with torch.no_grad():
        got = model(x, torch.tensor([8, 15]))
        torch.testing.assert_close(got[:1, :8], model(x[:1, :8]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1:], model(x[1:]), rtol=1e-4, atol=1e-5)


def test_a_decoder_learns_to_count() -> None:
    model = Transformer(VOCAB, dim=32, depth=1, heads=2, mechanism="window(2)", max_length=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        x = (tokens(16, 1) + torch.arange(13)) % VOCAB
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_what_has_no_causal_form_is_refused_as_a_decoder() -> None:
    for text, relative in (
        ("linformer", "performer_favor or moba"),
        ("nystromformer", "performer_favor or moba"),
        ("efficient_attention", "linear or performer_favor"),
    ):
        with pytest.raises(sc.NotSupported, match=f"no causal form.*{relative}"):
            decoder(text)


def test_too_many_tokens_are_refused_with_the_fix() -> None:
    model = decoder("causal")
    with pytest.raises(
        ValueError, match="21 tokens are more than max_length=20; build the model with a larger one"
    ):
        model(tokens(1, 21))
    _, states = model.step(tokens(1, 20), model.init_state(1))
    with pytest.raises(ValueError, match="21 tokens are more than max_length=20"):
        model.step(tokens(1, 1), states)


BOTH_WAYS = [
    "full",
    "neighborhood(5)",
    "linear",
    "performer_favor(8)",
    "efficient_attention",
    "linformer(rank=4, length=15)",
    "nystromformer(landmarks=3)",
    "top_blocks(4, top=2)",
    "additive(3)",
    "rope",
    "causal",
]


@pytest.mark.parametrize("text", BOTH_WAYS)
def test_an_encoder_does_not_read_padding(text: str) -> None:
    model = Encoder(VOCAB, dim=16, depth=2, heads=4, mechanism=text, max_length=20).eval()
    x = tokens(2, 15)
    other = x.clone()
    other[0, 8:] = (other[0, 8:] + 1) % VOCAB
    lengths = torch.tensor([8, 15])
    with torch.no_grad():
        got = model(x, lengths)
        assert got.shape == (2, 15, 16)
        torch.testing.assert_close(model(other, lengths)[0, :8], got[0, :8], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x[:1, :8]), got[:1, :8], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x[1:]), got[1:], rtol=1e-4, atol=1e-5)


def test_without_positions_an_encoder_is_equivariant() -> None:
    model = Encoder(VOCAB, dim=16, depth=2, heads=4, max_length=20).eval()
    with torch.no_grad():
        model.embedding.positions.weight.zero_()
        x, order = tokens(1, 15), torch.randperm(15)
        torch.testing.assert_close(model(x[:, order]), model(x)[:, order], rtol=1e-4, atol=1e-5)


def translator(text: str = "full", cross: str = "full") -> EncoderDecoder:
    return EncoderDecoder(VOCAB, dim=16, depth=2, heads=4, mechanism=text, cross=cross, max_length=20).eval()


@pytest.mark.parametrize(
    ("text", "cross"),
    [
        ("full", "full"),
        ("linear", "linear"),
        ("neighborhood(5)", "additive(3)"),
        ("full", "luong_attention(local=predictive, half=2)"),
    ],
)
def test_greedy_takes_the_likeliest_token_of_forward(text: str, cross: str) -> None:
    model, source = translator(text, cross), tokens(2, 9)
    lengths = torch.tensor([5, 9])
    found = model.greedy(source, start=1, length=7, source_lengths=lengths)
    assert found.shape == (2, 7)
    target = torch.cat((torch.ones(2, 1, dtype=torch.long), found[:, :-1]), 1)
    with torch.no_grad():
        logits = model(source, target, lengths)
    torch.testing.assert_close(logits.argmax(-1), found)


def test_a_decoder_reads_its_source_and_not_its_padding() -> None:
    model, source, target = translator(), tokens(2, 9), tokens(2, 6)
    lengths = torch.tensor([5, 9])
    other = source.clone()
    other[0, 5:] = (other[0, 5:] + 1) % VOCAB
    with torch.no_grad():
        got = model(source, target, lengths)
        assert got.shape == (2, 6, VOCAB)
        torch.testing.assert_close(model(other, target, lengths), got)
        other[0, 2] = (other[0, 2] + 1) % VOCAB
        assert not torch.allclose(model(other, target, lengths)[0], got[0], atol=1e-4)
        torch.testing.assert_close(model(source[:1, :5], target[:1]), got[:1], rtol=1e-4, atol=1e-5)


def test_every_target_row_reads_a_source_that_is_as_long_as_the_target() -> None:
    model, source, target = translator(), tokens(2, 6), tokens(2, 6)
    with torch.no_grad():
        got = model(source, target, torch.tensor([3, 6]))
        torch.testing.assert_close(model(source[:1, :3], target[:1]), got[:1], rtol=1e-4, atol=1e-5)


def test_target_padding() -> None:
    model, source, target = translator(), tokens(2, 9), tokens(2, 6)
    with torch.no_grad():
        got = model(source, target, None, torch.tensor([3, 6]))
        torch.testing.assert_close(got[:1, :3], model(source[:1], target[:1, :3]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1:], model(source[1:], target[1:]), rtol=1e-4, atol=1e-5)


def test_no_target_token_sees_a_later_one() -> None:
    model, source, target = translator("neighborhood(5)"), tokens(1, 9), tokens(1, 6)
    other = target.clone()
    other[:, 4:] = (other[:, 4:] + 1) % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(
            model(source, target)[:, :4], model(source, other)[:, :4], rtol=0, atol=1e-6
        )
