"""S240, cross-layer attention: blocks that read the keys and values of another block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.state import State
from saccade.tasks import text
from systems.helpers import below, dense, text_loss, train_on_text

DIM, HEADS, DEPTH = 32, 4, 4
pytestmark = pytest.mark.system("S240")
MECHANISMS = ["mqa", "gqa(2) + rope", "rope + window(4)", "causal + linear", "causal + alibi + out_gate"]


def build(mechanism: str, share: int, length: int = 24) -> sc.nn.Transformer:
    torch.manual_seed(0)
    return sc.nn.Transformer(19, DIM, DEPTH, HEADS, mechanism, length, share=share)


def decoded(model: sc.nn.Transformer, tokens: Tensor, first: int = 5) -> tuple[Tensor, list[State]]:
    """Logits of a prefill and then token by token, and the last states."""
    logits, states = model.step(tokens[:, :first], model.init_state(tokens.shape[0]))
    rows = [logits]
    for t in range(first, tokens.shape[1]):
        logits, states = model.step(tokens[:, t : t + 1], states)
        rows.append(logits)
    return torch.cat(rows, 1), states


def test_a_block_reads_its_owner() -> None:
    """The second block written out: its own queries over keys and values of what entered the first."""
    model = sc.nn.Transformer(19, DIM, 2, HEADS, "mqa", 24, share=2).double()
    tokens = torch.randint(19, (2, 9))
    first, second = model.blocks
    x = model.embedding(tokens)
    source = first.norm1(x)
    k, v = (p(source)[:, None] for p in (first.attention.key_proj, first.attention.value_proj))
    for block in (first, second):
        q = block.attention.query_proj(block.norm1(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mixed = dense(q, k, v, below(9)).transpose(1, 2).flatten(2)
        x = x + block.attention.out_proj(mixed)
        x = x + block.feed_forward(block.norm2(x))
    torch.testing.assert_close(model(tokens), model.norm(x) @ model.embedding.tokens.weight.T)


def test_sharing_with_nobody_is_the_plain_model() -> None:
    plain, one = sc.nn.Transformer(19, DIM, DEPTH, HEADS, "mqa", 24), build("mqa", 1)
    one.load_state_dict(plain.state_dict())
    tokens = torch.randint(19, (2, 9))
    assert torch.equal(one(tokens), plain(tokens))


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("share", [2, 3, 4])
def test_decoding_equals_the_whole(mechanism: str, share: int) -> None:
    model, tokens = build(mechanism, share).double(), torch.randint(19, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(decoded(model, tokens)[0], model(tokens), atol=1e-10, rtol=0)
    lengths = torch.tensor([24, 7])
    torch.testing.assert_close(model(tokens, lengths)[1, :7], model(tokens[1:, :7])[0])


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("share", [1, 2, 4])
def test_the_cache_is_divided_by_the_number_of_blocks_that_share(mechanism: str, share: int) -> None:
    tokens = torch.randint(19, (2, 24))
    with torch.no_grad():
        few, many = (decoded(build(mechanism, n), tokens)[1] for n in (share, 1))
    assert len(few) == DEPTH // share
    assert share * sum(s.nbytes for s in few) == sum(s.nbytes for s in many)


def test_blocks_that_share_need_no_projections() -> None:
    def count(share: int) -> int:
        return sum(p.numel() for p in build("mqa", share).parameters())

    assert count(1) - count(2) == 2 * 2 * DIM * DIM // HEADS
    assert count(1) - count(4) == 3 * 2 * DIM * DIM // HEADS


@pytest.mark.parametrize("mechanism", ["mqa", "gqa(2) + rope"])
def test_readers_copy_no_cache(mechanism: str) -> None:
    model, tokens = build(mechanism, 4, 60), torch.randint(19, (1, 40))
    with torch.no_grad():
        before = decoded(model, tokens)[1][0]
        x, kv = torch.randn(1, 1, DIM), model.blocks[0].keys_values(torch.randn(1, 1, DIM))
        own, *others = [block.attention.step(x, before, kv=kv)[1] for block in model.blocks]
    for state in others:
        for name in ("k", "v"):
            assert state.tensors[name].data_ptr() == own.tensors[name].data_ptr()


def test_states_that_grow_by_the_same_tokens_share_their_room() -> None:
    x = torch.randn(4, 1, 1, 3, 8)
    with torch.no_grad():
        start = State({"k": x[0], "v": x[1]}, 3).appended(k=x[0, :, :, :1], v=x[1, :, :, :1])
        one, same, other = (
            start.appended(k=y[:, :, :1], v=x[3, :, :, :1]) for y in (x[2], x[2].clone(), x[3])
        )
    assert same.tensors["k"].data_ptr() == one.tensors["k"].data_ptr()
    assert other.tensors["k"].data_ptr() != one.tensors["k"].data_ptr()
    assert torch.equal(same.tensors["k"], one.tensors["k"])
    assert torch.equal(one.tensors["k"][:, :, -1:], x[2, :, :, :1])
    assert torch.equal(other.tensors["k"][:, :, -1:], x[3, :, :, :1])


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="share is the number of blocks"):
        build("mqa", 0)
    layer = sc.nn.Attention(DIM, HEADS, "causal", borrows=True)
    with pytest.raises(ValueError, match="borrows its keys and values"):
        layer(torch.randn(1, 3, DIM))
    model = build("mqa", 2)
    with pytest.raises(ValueError, match="2 blocks keep a state, got 4"):
        model.step(torch.zeros(1, 1, dtype=torch.long), build("mqa", 1).init_state(1))


def losses(steps: int, seed: int) -> tuple[float, float]:
    """Held-out text losses of a model whose two blocks share one key-value head, and of one in which each has its own."""
    corpus, found = text.load(window=64), []
    for share in (2, 1):
        torch.manual_seed(seed)
        model = sc.nn.Transformer(text.VOCAB, 64, 2, 4, "mqa", 64, share=share)
        for table in (model.embedding.tokens, model.embedding.positions):
            torch.nn.init.normal_(table.weight, std=0.1)
        train_on_text(model, corpus, steps, length=64, seed=seed)
        found.append(text_loss(model, corpus, 64))
    return found[0], found[1]


def test_text_is_learned_about_as_well() -> None:
    shared, own = losses(120, 0)
    assert own < 3.0
    assert shared <= 1.05 * own, (shared, own)


@pytest.mark.slow
def test_half_a_cache_costs_less_than_two_percent() -> None:
    """Means of three runs."""
    found = torch.tensor([losses(600, seed) for seed in range(3)]).mean(0)
    assert found[0] <= 1.02 * found[1], found
