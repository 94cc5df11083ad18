"""S236, Linformer: keys and values projected along the length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.tasks.motifs import Motifs
from systems.helpers import dense, flops, qkv, train

pytestmark = pytest.mark.system("S236")


def projections(heads: int, rank: int, length: int) -> dict[str, Tensor]:
    return {
        name: torch.randn(heads, rank, length, dtype=torch.float64) * rank**-0.5
        for name in ("project_k", "project_v")
    }


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_equals_the_formula(kv: int) -> None:
    q, k, v = qkv(2, 4, 12, 6, kv=kv)
    params = projections(kv, 5, 12)
    found = sc.attend(q, k, v, "linformer(5, length=12)", params=params)
    expected = dense(q, params["project_k"] @ k, params["project_v"] @ v)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_as_many_rows_as_tokens_and_identity_projections_give_softmax_attention() -> None:
    q, k, v = qkv(2, 3, 12, 6)
    eye = torch.eye(12, dtype=torch.float64).expand(3, 12, 12)
    found = sc.attend(q, k, v, "linformer(12, length=12)", params={"project_k": eye, "project_v": eye})
    torch.testing.assert_close(found, dense(q, k, v), atol=1e-12, rtol=0)


def test_padded_keys_have_no_effect() -> None:
    q, k, v = qkv(3, 2, 12, 6)
    params, lengths = projections(2, 5, 12), torch.tensor([12, 7, 1])
    text = "linformer(5, length=12)"
    found = sc.attend(q, k, v, text, params=params, key_lengths=lengths)
    gone = (torch.arange(12) >= lengths[:, None])[:, None, :, None]
    poisoned = [x.masked_fill(gone, torch.nan) for x in (k, v)]
    assert torch.equal(sc.attend(q, *poisoned, text, params=params, key_lengths=lengths), found)
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        short = sc.attend(q[one, :, :n], k[one, :, :n], v[one, :, :n], text, params=params)
        torch.testing.assert_close(found[one, :, :n], short, atol=1e-12, rtol=0)


def test_shorter_input_uses_the_first_columns_and_longer_input_is_refused() -> None:
    q, k, v = qkv(1, 2, 9, 6)
    params = projections(2, 5, 12)
    first = {name: x[..., :9] for name, x in params.items()}
    torch.testing.assert_close(
        sc.attend(q, k, v, "linformer(5, length=12)", params=params),
        sc.attend(q, k, v, "linformer(5, length=9)", params=first),
        atol=1e-12,
        rtol=0,
    )
    with pytest.raises(sc.NotSupported, match="at most 8 tokens, got 9"):
        sc.attend(q, k, v, "linformer(5, length=8)", params={n: x[..., :8] for n, x in params.items()})


def test_causal_use_is_refused_with_a_relative() -> None:
    with pytest.raises(sc.NotSupported, match="performer_favor"):
        sc.mechanism("causal + linformer(8)")
    with pytest.raises(sc.NotSupported, match="performer_favor"):
        sc.nn.Transformer(vocab=8, dim=16, depth=1, heads=2, mechanism="linformer(8)")


@pytest.mark.parametrize("n", [512, 1024, 2048])
def test_doubling_the_length_doubles_the_cost(n: int) -> None:
    def cost(n: int) -> tuple[int, int]:
        text = f"linformer(64, length={n})"
        layer = sc.nn.Attention(32, 2, text)
        q, k, v = layer.project(torch.zeros(1, n, 32))
        params = {"project_k": layer.project_k, "project_v": layer.project_v}
        return flops(lambda: sc.attend(q, k, v, text, params=params)), sc.plan(text, (1, 2, n, 16)).cost.flops

    for small, large in zip(cost(n), cost(2 * n), strict=True):
        assert large <= 2.3 * small


def test_memory_stays_below_that_of_all_pairs() -> None:
    n = 4096
    projected = sc.plan(f"linformer(64, length={n})", (1, 8, n, 64)).cost
    longer = sc.plan(f"linformer(64, length={2 * n})", (1, 8, 2 * n, 64)).cost
    assert longer.peak <= 2.3 * projected.peak
    assert projected.flops < sc.plan("transformer", (1, 8, n, 64)).cost.flops / 20


class Classifier(nn.Module):
    """A short convolution finds motifs, attention carries them to the first token, which names the family."""

    def __init__(self, task: Motifs, mechanism: str, dim: int = 32) -> None:
        super().__init__()
        self.encoder = sc.nn.Encoder(task.vocab, dim, 1, 2, mechanism, task.length)
        self.near = nn.Conv1d(dim, dim, task.width + 1, padding=task.width // 2)
        self.head = nn.Linear(dim, task.families)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder.embedding(tokens)
        x = x + torch.relu(self.near(x.transpose(1, 2))).transpose(1, 2)
        for block in self.encoder.blocks:
            x = block(x)
        return self.head(self.encoder.norm(x)[:, 0])


def accuracy(mechanism: str, steps: int = 200) -> float:
    torch.manual_seed(0)
    task, generator = Motifs(length=256, copies=16), torch.Generator().manual_seed(0)
    model = Classifier(task, mechanism)

    def loss(step: int) -> Tensor:
        tokens, family = task.batch(32, generator)
        return F.cross_entropy(model(tokens), family)

    train(model.parameters(), loss, steps, rate=8e-3)
    tokens, family = task.batch(1000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(tokens).argmax(-1) == family).float().mean())


def test_tells_motif_families_apart_as_full_attention_does() -> None:
    full, projected, own_token = (
        accuracy(m) for m in ("transformer", "linformer(64, length=256)", "window(1)")
    )
    assert projected >= full - 0.02
    assert projected > 0.9
    assert own_token < 0.6
