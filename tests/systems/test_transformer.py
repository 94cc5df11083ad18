"""S077, Transformer: the mechanism and the blocks around it, against torch.nn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import Block
from saccade.tasks.metric import exact_match
from saccade.tasks.numerals import Numerals
from systems.helpers import train

DIM, HEADS, LENGTH = 32, 4, 11
pytestmark = pytest.mark.system("S077")


def copy_attention(ours: sc.nn.Attention, theirs: nn.MultiheadAttention) -> None:
    """Weights of torch's layer into ours; biases too where both have them, else torch's become zero."""
    for projection, weight in zip(
        (ours.query_proj, ours.key_proj, ours.value_proj),
        theirs.in_proj_weight.detach().chunk(3),
        strict=True,
    ):
        assert projection is not None
        projection.weight.data.copy_(weight)
    ours.out_proj.weight.data.copy_(theirs.out_proj.weight)
    if ours.out_proj.bias is None:
        theirs.in_proj_bias.data.zero_()
        theirs.out_proj.bias.data.zero_()
        return
    theirs.in_proj_bias.data.normal_()
    theirs.out_proj.bias.data.normal_()
    for projection, bias in zip(
        (ours.query_proj, ours.key_proj, ours.value_proj), theirs.in_proj_bias.detach().chunk(3), strict=True
    ):
        assert projection is not None
        projection.bias.data.copy_(bias)
    ours.out_proj.bias.data.copy_(theirs.out_proj.bias)


def copy_block(ours: Block, theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    """Weights of a whole pre-norm torch layer into a block."""
    copy_attention(ours.attention, theirs.self_attn)
    pairs = [
        (ours.norm1, theirs.norm1),
        (ours.feed_forward[0], theirs.linear1),
        (ours.feed_forward[2], theirs.linear2),
    ]
    if isinstance(theirs, nn.TransformerDecoderLayer):
        assert ours.cross is not None
        assert ours.cross_norm is not None
        copy_attention(ours.cross, theirs.multihead_attn)
        pairs += [(ours.cross_norm, theirs.norm2), (ours.norm2, theirs.norm3)]
    else:
        pairs.append((ours.norm2, theirs.norm2))
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())


def layer(cls: type[nn.Module]) -> nn.Module:
    return cls(DIM, HEADS, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)


def padding(lengths: Tensor, n: int) -> Tensor:
    """True where a token is padding."""
    return torch.arange(n) >= lengths[:, None]


def agree(ours: Tensor, theirs: Tensor, lengths: Tensor | None = None) -> None:
    """Equal to 1e-5 at every position that is no padding."""
    if lengths is not None:
        real = ~padding(lengths, ours.shape[1])
        ours, theirs = ours[real], theirs[real]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", ["transformer", "causal + transformer"])
@pytest.mark.parametrize("padded", [False, True])
def test_self_attention_equals_multihead_attention(text: str, padded: bool) -> None:
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    ours = sc.nn.Attention(DIM, HEADS, text, bias=True)
    copy_attention(ours, theirs)
    x, lengths = torch.randn(3, LENGTH, DIM), torch.tensor([LENGTH, 4, 1])
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH) if "causal" in text else None
    expected, weights = theirs(
        x,
        x,
        x,
        attn_mask=None if causal is None else causal.isinf(),
        key_padding_mask=padding(lengths, LENGTH) if padded else None,
        average_attn_weights=False,
    )
    found = ours(x, key_lengths=lengths if padded else None, need=("out", "weights"))
    agree(found.out, expected, lengths if padded else None)
    agree(found.weights.transpose(1, 2), weights.transpose(1, 2), lengths if padded else None)


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_cross_attention_equals_multihead_attention(rows: int) -> None:
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    ours = sc.nn.Attention(DIM, HEADS, "transformer", bias=True)
    copy_attention(ours, theirs)
    x, memory, lengths = torch.randn(3, rows, DIM), torch.randn(3, LENGTH, DIM), torch.tensor([LENGTH, 4, 1])
    expected, _ = theirs(x, memory, memory, key_padding_mask=padding(lengths, LENGTH))
    agree(ours(x, memory, key_lengths=lengths), expected)


def test_gradients_equal_those_of_multihead_attention() -> None:
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    ours = sc.nn.Attention(DIM, HEADS, "causal + transformer", bias=True)
    copy_attention(ours, theirs)
    x = torch.randn(2, LENGTH, DIM)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH).isinf()
    ours(x).square().sum().backward()
    theirs(x, x, x, attn_mask=mask, need_weights=False)[0].square().sum().backward()
    assert ours.query_proj is not None
    mine = torch.cat([p.weight.grad for p in (ours.query_proj, ours.key_proj, ours.value_proj)])
    torch.testing.assert_close(mine, theirs.in_proj_weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_encoder_layer(causal: bool) -> None:
    theirs = layer(nn.TransformerEncoderLayer)
    ours = Block(DIM, HEADS, sc.mechanism("causal + transformer" if causal else "transformer"))
    copy_block(ours, theirs)
    x, lengths = torch.randn(3, LENGTH, DIM), torch.tensor([LENGTH, 4, 1])
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH).isinf() if causal else None
    expected = theirs(x, src_mask=mask, src_key_padding_mask=padding(lengths, LENGTH))
    agree(ours(x, lengths), expected, lengths)


def test_block_equals_decoder_layer() -> None:
    theirs = layer(nn.TransformerDecoderLayer)
    ours = Block(DIM, HEADS, sc.mechanism("causal + transformer"), sc.mechanism("transformer"))
    copy_block(ours, theirs)
    x, memory = torch.randn(3, 7, DIM), torch.randn(3, LENGTH, DIM)
    lengths, memory_lengths = torch.tensor([7, 3, 1]), torch.tensor([LENGTH, 4, 1])
    expected = theirs(
        x,
        memory,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7).isinf(),
        tgt_key_padding_mask=padding(lengths, 7),
        memory_key_padding_mask=padding(memory_lengths, LENGTH),
    )
    agree(ours(x, lengths, memory, memory_lengths), expected, lengths)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_encoder_decoder_equals_torch_transformer() -> None:
    ours = sc.nn.EncoderDecoder(
        vocab=13, dim=DIM, depth=2, heads=HEADS, mechanism="transformer", max_length=16
    )
    theirs = nn.Transformer(
        DIM, HEADS, 2, 2, 4 * DIM, 0.0, activation="gelu", batch_first=True, norm_first=True
    )
    for mine, other in zip(
        [*ours.encoder.blocks, *ours.blocks], [*theirs.encoder.layers, *theirs.decoder.layers], strict=True
    ):
        copy_block(mine, other)
    ours.encoder.norm.load_state_dict(theirs.encoder.norm.state_dict())
    ours.norm.load_state_dict(theirs.decoder.norm.state_dict())
    source, target = torch.randint(13, (3, LENGTH)), torch.randint(13, (3, 7))
    lengths, target_lengths = torch.tensor([LENGTH, 4, 1]), torch.tensor([7, 5, 2])
    features = theirs(
        ours.encoder.embedding(source),
        ours.embedding(target),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7).isinf(),
        src_key_padding_mask=padding(lengths, LENGTH),
        memory_key_padding_mask=padding(lengths, LENGTH),
        tgt_key_padding_mask=padding(target_lengths, 7),
    )
    expected = features @ ours.embedding.tokens.weight.T
    agree(ours(source, target, lengths, target_lengths), expected, target_lengths)


def test_encoder_without_positions_is_permutation_equivariant() -> None:
    model = sc.nn.Encoder(
        vocab=50, dim=DIM, depth=3, heads=HEADS, mechanism="transformer", max_length=LENGTH
    ).double()
    model.embedding.positions.weight.data.zero_()
    tokens, order = torch.randint(50, (2, LENGTH)), torch.randperm(LENGTH)
    torch.testing.assert_close(model(tokens[:, order]), model(tokens)[:, order], atol=1e-12, rtol=0)
    model.embedding.positions.weight.data.normal_()
    assert (model(tokens[:, order]) - model(tokens)[:, order]).abs().max() > 0.1


def test_translates_number_words_it_has_never_seen() -> None:
    """Greedy decoding; beam search is not part of the library yet."""
    task = Numerals()
    generator = torch.Generator().manual_seed(0)
    model = sc.nn.EncoderDecoder(
        task.vocab, dim=48, depth=2, heads=4, mechanism="transformer", max_length=task.source_length
    )

    def loss(step: int) -> Tensor:
        source, lengths, digits = task.batch(64, generator)
        logits = model(source, task.shifted(digits), lengths)
        return F.cross_entropy(logits.flatten(0, 1), digits.flatten(), label_smoothing=0.1)

    train(model.parameters(), loss, steps=500, rate=5e-3)
    source, lengths, digits = task.heldout(1000)
    found = model.greedy(source, task.start, digits.shape[1], lengths)
    assert task.baseline() < 0.6
    assert exact_match(found, digits) >= 0.98
