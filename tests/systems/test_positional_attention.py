"""S244, positional attention: weights from fixed position codes, the same for every input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import saccade as sc
from systems.helpers import FRESH, train

pytestmark = pytest.mark.system("S244")


@pytest.mark.parametrize("codes", ["one_hot", "sinusoidal"])
def test_the_layer_by_loops(codes: str) -> None:
    layer = sc.nn.PositionalAttention(6, 2, codes, max_length=9, code_dim=4).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    v, out = layer.value_proj(x), layer(x)
    for h in range(2):
        for i in range(5):
            rows = []
            for n in range(5):
                if codes == "one_hot":
                    rows.append(torch.eye(9, dtype=torch.float64)[n])
                else:
                    rows.append(
                        torch.tensor(
                            [math.sin(n), math.cos(n), math.sin(n / 100), math.cos(n / 100)]
                        ).double()
                    )
            s = torch.stack([(rows[i] @ layer.query[h]) @ (rows[j] @ layer.key[h]) for j in range(5)])
            expected = torch.softmax(s, 0) @ v[:, :, 3 * h : 3 * h + 3]
            torch.testing.assert_close(out[:, i, 3 * h : 3 * h + 3], expected, atol=1e-6, rtol=0)


def test_two_inputs_are_mixed_by_the_same_weights_bit_for_bit() -> None:
    layer = sc.nn.PositionalAttention(16, 4)
    probe = torch.eye(8).repeat(1, 1, 2)
    with torch.no_grad():
        layer.value_proj.weight.copy_(torch.eye(16))
        a, b = (layer(probe + 0 * torch.randn(1, 8, 16)) for _ in range(2))
    assert torch.equal(a, b)
    x, y = torch.randn(2, 1, 8, 16)
    torch.testing.assert_close(layer(x + y), layer(x) + layer(y))
    assert torch.equal(layer.weights(8), layer.weights(8))


def test_kept_weights_equal_those_computed_anew_and_follow_a_changed_map() -> None:
    kept, fresh = sc.nn.PositionalAttention(16, 4, keep=4 * 8 * 8), sc.nn.PositionalAttention(16, 4)
    fresh.load_state_dict(kept.state_dict())
    x = torch.randn(2, 8, 16)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(kept(x), fresh(x))
        assert kept.weights(8) is kept.weights(8)
        assert kept.weights(9) is not kept.weights(9)
        for layer in (kept, fresh):
            layer.query.mul_(2)
        assert torch.equal(kept(x), fresh(x))
    assert kept.weights(8).requires_grad
    kept(x).sum().backward()
    assert kept.query.grad is not None


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="dim=10 must be a multiple of heads=4"):
        sc.nn.PositionalAttention(10, 4)
    with pytest.raises(ValueError, match="codes must be one_hot or sinusoidal, got 'rope'"):
        sc.nn.PositionalAttention(8, 2, "rope")
    with pytest.raises(ValueError, match="9 tokens are more than max_length=8; use codes='sinusoidal'"):
        sc.nn.PositionalAttention(8, 2, max_length=8)(torch.zeros(1, 9, 8))


class ContentBlock(nn.Module):
    """The same block around ordinary attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = sc.nn.Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(torch.cat((self.attention(x), x), -1))


class Model(nn.Module):
    """Three blocks on numbers; ordinary attention also sees one-hot positions."""

    def __init__(self, positional: bool, width: int = 1, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.positional = positional
        self.encoder, self.decoder = nn.Linear(width if positional else width + 8, dim), nn.Linear(dim, 1)
        self.blocks = nn.Sequential(
            *(
                sc.nn.PositionalBlock(dim, heads, max_length=8) if positional else ContentBlock(dim, heads)
                for _ in range(3)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dim() == 3 else x.unsqueeze(-1)
        if not self.positional:
            x = torch.cat((x, torch.eye(8).expand(len(x), 8, 8)), -1)
        return self.decoder(self.blocks(self.encoder(x))).squeeze(-1)


def out_of_range(task: Callable[[Tensor], Tensor], positional: bool, steps: int, seed: int = FRESH) -> float:
    """Relative error at values of [-20, 20] of a model trained on ranges up to [-2, 2]."""
    torch.manual_seed(seed)
    model, generator = Model(positional), torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        x = 2 * torch.rand(32, 1, generator=generator) * (2 * torch.rand(32, 8, generator=generator) - 1)
        return (model(x) - task(x)).square().mean()

    train(model.parameters(), loss, steps, rate=8e-3)
    x = 40 * torch.rand(512, 8, generator=torch.Generator().manual_seed(seed + 1)) - 20
    with torch.no_grad():
        return float((model(x) - task(x)).norm() / task(x).norm())


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.cumsum(1),
    "min": lambda x: x.cummin(1).values,
}


@pytest.mark.parametrize("task", TASKS)
def test_values_ten_times_those_of_training(task: str) -> None:
    content = out_of_range(TASKS[task], False, 400)
    assert 3 * out_of_range(TASKS[task], True, 400) <= content


def looked_up(positional: bool, seed: int = FRESH) -> float:
    """Squared error, as a share of the variance, in finding the value whose key equals that of the first token."""
    torch.manual_seed(seed)
    model, generator = Model(positional, width=9), torch.Generator().manual_seed(seed)

    def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        keys = 1 + torch.rand(size, 7, generator=generator).argsort(1)
        values = torch.randn(size, 8, generator=generator)
        values[:, 0] = 0
        asked = torch.randint(7, (size, 1), generator=generator)
        keys = torch.cat((keys.gather(1, asked), keys), 1)
        tokens = torch.cat((values.unsqueeze(-1), nn.functional.one_hot(keys, 8).float()), -1)
        return tokens, values[:, 1:].gather(1, asked).squeeze(1)

    def loss(step: int) -> Tensor:
        tokens, wanted = batch(64, generator)
        return (model(tokens)[:, 0] - wanted).square().mean()

    train(model.parameters(), loss, 300, rate=5e-3)
    tokens, wanted = batch(1024, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return float((model(tokens)[:, 0] - wanted).square().mean() / wanted.var())


def test_looking_up_by_content_is_beyond_it() -> None:
    assert looked_up(True) >= 0.5
    assert looked_up(False) <= 0.25
