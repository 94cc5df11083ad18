"""S192, efficient attention: a context matrix between two normalised sides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from systems.helpers import flops, largest_temporary, qkv, train

pytestmark = pytest.mark.system("S192")


def test_the_scaling_variant_is_the_product_divided_by_the_number_of_keys() -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        q, k, v = qkv(2, 3, 40, 8, keys=25, dtype=dtype)
        found = sc.attend(q, k, v, "efficient_attention(scaling)")
        torch.testing.assert_close(found, q @ k.transpose(-1, -2) / 25 @ v, atol=tolerance, rtol=tolerance)


def test_the_softmax_variant_equals_the_formula() -> None:
    q, k, v = qkv(2, 3, 40, 8, keys=25)
    expected = torch.softmax(q, -1) @ (torch.softmax(k, 2).transpose(-1, -2) @ v)
    torch.testing.assert_close(sc.attend(q, k, v, "efficient_attention"), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("lengths", [None, [25, 9, 1]])
def test_the_weights_of_the_softmax_variant_sum_to_one(lengths: list[int] | None) -> None:
    q, k, v = qkv(3, 2, 25, 8)
    ragged = None if lengths is None else torch.tensor(lengths)
    found = sc.attend(q, k, v, "efficient_attention", key_lengths=ragged, need=("out", sc.Weights()))
    assert (found.weights >= 0).all()
    torch.testing.assert_close(
        found.weights.sum(-1), torch.ones(3, 2, 25, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(found.out, found.weights @ v, atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", ["softmax", "scaling"])
def test_padding_counts_neither_as_a_key_nor_in_the_number_of_keys(variant: str) -> None:
    q, k, v = qkv(3, 2, 25, 8)
    lengths = torch.tensor([25, 9, 1])
    found = sc.attend(q, k, v, f"efficient_attention({variant})", key_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        short = sc.attend(q[one, :, :n], k[one, :, :n], v[one, :, :n], f"efficient_attention({variant})")
        torch.testing.assert_close(found[one, :, :n], short, atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", ["softmax", "scaling"])
def test_causal_use_is_refused_with_a_relative(variant: str) -> None:
    with pytest.raises(sc.NotSupported, match=r"linear|identity"):
        sc.mechanism(f"causal + efficient_attention({variant})")
    with pytest.raises(sc.NotSupported, match="causal relative"):
        sc.nn.Transformer(vocab=8, dim=16, depth=1, heads=2, mechanism=f"efficient_attention({variant})")


@pytest.mark.parametrize("n", [1024, 4096, 16384])
def test_memory_and_work_double_with_the_length(n: int) -> None:
    costs = [sc.plan("efficient_attention", (1, 8, length, 64)).cost for length in (n, 2 * n)]
    assert costs[1].peak <= 2.2 * costs[0].peak
    assert costs[1].flops <= 2.2 * costs[0].flops
    q, k, v = qkv(1, 8, n // 4, 64, dtype=torch.float32)
    half = [x[:, :, : n // 8] for x in (q, k, v)]
    assert flops(lambda: sc.attend(q, k, v, "efficient_attention")) == costs[0].flops // 4
    largest = [largest_temporary(lambda x=x: sc.attend(*x, "efficient_attention")) for x in (half, (q, k, v))]
    assert largest[1] <= 2.2 * largest[0]


class Digits(nn.Module):
    """Two convolutions, an attention block over the 64 places, and a linear head."""

    def __init__(self, mechanism: str) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )
        self.attention = sc.nn.Attention(32, 1, mechanism)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convolutions(images).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x)).amax(1))


def accuracy(mechanism: str) -> float:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels))
    seen, held = order[:-500], order[-500:]
    model = Digits(mechanism)

    def loss(step: int) -> Tensor:
        rows = seen[torch.randint(len(seen), (64,))]
        return F.cross_entropy(model(images[rows]), labels[rows])

    train(model.parameters(), loss, steps=400, rate=5e-3)
    with torch.no_grad():
        return float((model(images[held]).argmax(-1) == labels[held]).float().mean())


def test_a_digits_network_is_as_accurate_as_with_a_dot_product_block() -> None:
    linear, full = accuracy("efficient_attention"), accuracy("transformer")
    assert linear >= full - 0.02
    assert linear > 0.95
