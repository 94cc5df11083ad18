"""S113, Hepos: each head of a cross-attention reads its own residue class of the source."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from systems.helpers import FRESH, dense, largest_temporary, qkv, train

pytestmark = pytest.mark.system("S113")


def test_a_stride_of_one_is_full_cross_attention() -> None:
    q, k, v = qkv(2, 4, 7, 8, keys=50)
    torch.testing.assert_close(sc.attend(q, k, v, "hepos(1)"), dense(q, k, v), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("heads", "stride"), [(4, 4), (8, 4), (6, 3), (4, 2)])
def test_the_heads_cover_every_position_equally_often(heads: int, stride: int) -> None:
    q, k, v = qkv(1, heads, 5, 8, keys=24)
    w = sc.attend(q, k, v, f"hepos({stride})", need="weights").weights
    assert ((w > 0).sum(1) == heads // stride).all()
    for h in range(heads):
        assert set((w[0, h, 0] > 0).nonzero().flatten().tolist()) == set(range(h % stride, 24, stride))


@pytest.mark.parametrize("kv", [1, 4])
@pytest.mark.parametrize("lengths", [None, [50, 13]])
def test_slices_equal_the_mask_and_its_gradients(kv: int, lengths: list[int] | None) -> None:
    leaves = [x.requires_grad_() for x in qkv(2, 4, 9, 8, kv=kv, keys=50)]
    head, key = torch.arange(4)[:, None, None], torch.arange(50)
    exist = ((key - head) % 4 == 0)[None]
    options = {}
    if lengths is not None:
        options["key_lengths"] = torch.tensor(lengths)
        exist = exist & (key < options["key_lengths"][:, None, None, None])
    found, truth = sc.attend(*leaves, "hepos", **options), dense(*leaves, exist)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), leaves) for x in (found, truth)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_scores_and_work_drop_by_the_stride() -> None:
    q, k, v = qkv(1, 8, 256, 16, keys=4096, dtype=torch.float32)
    shape = sc.Shape(1, 8, 256, 16, 8, 4096)
    assert sc.plan("full", shape).cost.flops == 8 * sc.plan("hepos(8)", shape).cost.flops
    assert all(p.kernel.startswith("thin") for p in sc.plan("hepos(8)", shape).members)
    scores = 8 * 256 * 4096 * 4
    assert largest_temporary(lambda: sc.attend(q, k, v, "hepos(8)")) <= scores / 8


class Copier(nn.Module):
    """One cross-attention from as many slots as there are words to copy, to a source without an encoder."""

    def __init__(self, words: int, slots: int, mechanism: str) -> None:
        super().__init__()
        self.tokens, self.marks = nn.Embedding(words, 32), nn.Embedding(slots + 1, 32)
        self.slots = nn.Parameter(torch.randn(slots, 32))
        self.cross = sc.nn.Attention(32, 4, mechanism)
        self.read = nn.Linear(32, words)
        for table in (self.tokens, self.marks):
            nn.init.normal_(table.weight, std=1.0)

    def forward(self, source: Tensor, marks: Tensor) -> Tensor:
        x = self.tokens(source) + self.marks(marks)
        return self.read(self.cross(self.slots.expand(len(x), -1, -1), x))


def copied(mechanism: str, length: int = 256, words: int = 8, slots: int = 6, seed: int = FRESH) -> float:
    """Accuracy of copying a marked sentence of 6 words from a source of 256."""
    torch.manual_seed(seed)
    model, generator = Copier(words, slots, mechanism), torch.Generator().manual_seed(seed)

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.randint(words, (size, length), generator=generator)
        start = torch.randint(length - slots, (size, 1), generator=generator)
        at = start + torch.arange(slots)
        marks = torch.zeros_like(source).scatter(1, at, (torch.arange(slots) + 1).expand(size, -1))
        return source, marks, source.gather(1, at)

    def loss(step: int) -> Tensor:
        source, marks, words_ = batch(16)
        return F.cross_entropy(model(source, marks).flatten(0, 1), words_.flatten())

    train(model.parameters(), loss, 1000, rate=1e-2)
    source, marks, wanted = batch(256)
    with torch.no_grad():
        return float((model(source, marks).argmax(-1) == wanted).float().mean())


def test_a_marked_sentence_whose_words_one_head_sees_each_is_copied_as_with_full_attention() -> None:
    full, strided = copied("full"), copied("hepos(4)")
    assert full > 0.95
    assert strided >= full - 0.02
