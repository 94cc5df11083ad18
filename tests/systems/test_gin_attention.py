"""S260, GIN attention: attention weights as a graph, a sum that counts, and a small adapter on a frozen model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import train

pytestmark = pytest.mark.system("S260")


@pytest.mark.parametrize("text", ["full", "causal", "gqa(2) + rope + window(5)"])
def test_without_a_node_of_its_own_and_a_linear_map_it_is_attention(text: str) -> None:
    layer, plain = sc.nn.GINAttention(32, 4, text, hidden=0), sc.nn.Attention(32, 4, text)
    own = {**layer.attention.state_dict(), "out_proj.weight": layer.mlp.weight}
    plain.load_state_dict(own)
    nn.init.constant_(layer.eps, -1.0)
    x = torch.randn(2, 12, 32)
    lengths = torch.tensor([7, 12])
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=0)
    found, expected = layer(x, key_lengths=lengths), plain(x, key_lengths=lengths)
    torch.testing.assert_close(found[0, :7], expected[0, :7], atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", ["causal", "window(4)"])
def test_an_adapter_of_weight_zero_leaves_the_frozen_model_bit_for_bit(text: str) -> None:
    model = sc.nn.Transformer(11, dim=32, depth=2, heads=4, mechanism=text, max_length=20)
    tokens, lengths = torch.randint(0, 11, (3, 20)), torch.tensor([20, 9, 1])
    with torch.no_grad():  # a layer that trains may run another kernel, which rounds elsewhere
        before, padded = model(tokens), model(tokens, lengths)
        tuned = sc.nn.add_gin_adapters(model, hidden=4)
        assert torch.equal(model(tokens), before)
        assert torch.equal(model(tokens, lengths), padded)
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in tuned}
    for block in model.blocks:
        nn.init.constant_(block.attention.lam, 0.5)
    assert (model(tokens) - before).abs().max() > 1e-3


def test_a_normalised_row_cannot_tell_one_neighbour_from_two_and_a_binary_edge_can() -> None:
    x = torch.randn(2, 32)
    once, twice = x[None, [0, 1]], x[None, [0, 0, 1, 1]]
    plain = sc.nn.GINAttention(32, 4)
    binary = sc.nn.GINAttention(32, 4, threshold=0.01, binary=True)
    torch.testing.assert_close(plain(once)[0, 0], plain(twice)[0, 0])
    assert (binary(once)[0, 0] - binary(twice)[0, 0]).abs().max() > 1e-2


class Counter(nn.Module):
    """How often a token stands in its sequence, from edges that at first join tokens that are equal."""

    def __init__(self, binary: bool, fixed: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 32)
        self.graph = sc.nn.GINAttention(32, 1, threshold=0.05, binary=binary, hidden=128)
        attention = self.graph.attention
        attention.query_proj.weight.data.mul_(2)
        attention.key_proj.load_state_dict(attention.query_proj.state_dict())
        attention.query_proj.requires_grad_(not fixed)
        attention.key_proj.requires_grad_(not fixed)
        self.head = nn.Linear(32, 7)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.graph(self.embedding(tokens), key_lengths=lengths))


def counts(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences (size, 16) of 8 tokens, their lengths of 4 to 16, and how often each token stands there, 6 at most."""
    lengths = torch.randint(4, 17, (size,), generator=generator)
    tokens = torch.randint(0, 8, (size, 16), generator=generator)
    valid = torch.arange(16) < lengths[:, None]
    same = (tokens[:, :, None] == tokens[:, None]) & valid[:, None]
    return tokens, lengths, same.sum(-1).clamp_max(6).where(valid, SILENT)


def counted(binary: bool, fixed: bool = True, steps: int = 250) -> float:
    """Accuracy of counting after training, with the graph or without."""
    model, generator = Counter(binary, fixed), torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        tokens, lengths, targets = counts(64, generator)
        return F.cross_entropy(model(tokens, lengths).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train([p for p in model.parameters() if p.requires_grad], loss, steps, rate=1e-2)
    tokens, lengths, targets = counts(500, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(model(tokens, lengths), targets)


def test_equal_tokens_are_counted_by_binary_edges_and_not_by_normalised_ones() -> None:
    binary, normalised = counted(True), counted(False)
    print(f"counting: binary {binary:.3f}, normalised {normalised:.3f}")
    assert binary >= 0.95
    assert normalised <= 0.6


@pytest.mark.slow
def test_a_graph_that_goes_on_learning_still_counts() -> None:
    """Slower, since the gradient of a binary edge is a guess, that of its weight."""
    found = counted(True, fixed=False, steps=1000)
    print(f"counting with a learned graph: {found:.3f}")
    assert found >= 0.95


VOCAB, LENGTH = 16, 32


def source(seed: int) -> Tensor:
    """The transition matrix (VOCAB, VOCAB) of a Markov source."""
    return torch.softmax(2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)), dim=-1)


def texts(matrix: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Sequences (size, LENGTH) from a source."""
    tokens = [torch.randint(0, VOCAB, (size,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(matrix[tokens[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(tokens, dim=1)


def next_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def tune(model: nn.Module, owned: list[nn.Parameter], matrix: Tensor, steps: int, rate: float) -> float:
    """Loss on fresh text of a source after training some parameters on it."""
    generator = torch.Generator().manual_seed(0)
    train(owned, lambda step: next_loss(model, texts(matrix, 32, generator)), steps, rate)
    with torch.no_grad():
        return float(next_loss(model, texts(matrix, 500, torch.Generator().manual_seed(1))))


class LowRank(nn.Module):
    """A frozen linear map plus a product of two thin ones that starts at zero (Hu et al., LoRA, 2021)."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def low_rank(model: sc.nn.Transformer, rank: int) -> list[nn.Parameter]:
    """Freezes a model and puts LowRank around its query and value maps."""
    model.requires_grad_(False)
    added = []
    for block in model.blocks:
        for name in ("query_proj", "value_proj"):
            wrapped = LowRank(getattr(block.attention, name), rank)
            setattr(block.attention, name, wrapped)
            added += [wrapped.down.weight, wrapped.up.weight]
    return added


def test_a_small_adapter_learns_most_of_what_full_tuning_does() -> None:
    old, new = source(0), source(1)
    model = sc.nn.Transformer(VOCAB, dim=64, depth=2, heads=4, max_length=LENGTH)
    tune(model, list(model.parameters()), old, 100, 3e-3)
    whole, adapted, lora = (copy.deepcopy(model) for _ in range(3))
    with torch.no_grad():
        start = float(next_loss(model, texts(new, 500, torch.Generator().manual_seed(1))))
    full = tune(whole, list(whole.parameters()), new, 100, 3e-3)
    total = sum(p.numel() for p in model.parameters())
    owned, ranked = sc.nn.add_gin_adapters(adapted, hidden=16), low_rank(lora, rank=8)
    sizes = [sum(p.numel() for p in ps) / total for ps in (owned, ranked)]
    graph, thin = (tune(m, ps, new, 100, 1e-2) for m, ps in ((adapted, owned), (lora, ranked)))
    gains = [(start - loss) / (start - full) for loss in (graph, thin)]
    print(
        f"loss {start:.3f} before, {full:.3f} tuned whole; share of the gain: GIN {gains[0]:.2f} by {sizes[0]:.3f} of "
    )
    print(f"the parameters, LoRA {gains[1]:.2f} by {sizes[1]:.3f}")
    assert sizes[0] < 0.05
    assert start - full > 0.5
    assert gains[0] >= 0.5
