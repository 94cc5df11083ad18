"""S116, Neural Attention: a score by a small network on each pair, which tells distances that no product can."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.parts.base import Sizes
from saccade.systems.neural_attention import PairMLP
from saccade.tasks.nearest import NearestKey
from systems.helpers import below, qkv, stepwise, train

HEADS, D, P = 4, 6, 3
pytestmark = pytest.mark.system("S116")


def drawn(score: PairMLP, groups: int = HEADS) -> dict[str, Tensor]:
    """Weights of a score, none of them at its starting value."""
    declared = score.weights(Sizes(HEADS, groups, D, D))
    return {n: torch.randn(w.shape, dtype=torch.float64) for n, w in declared.items()}


def concatenated(q: Tensor, k: Tensor, params: dict[str, Tensor], depth: int) -> Tensor:
    """Logits pair by pair from the concatenation of what is projected, as the paper draws it."""
    b, _, rows, _ = q.shape
    s = torch.empty(b, HEADS, rows, k.shape[2], dtype=q.dtype)
    for h in range(HEADS):
        g = h * k.shape[1] // HEADS
        for i in range(rows):
            for j in range(k.shape[2]):
                x = torch.cat((q[:, h, i] @ params["pair_q"][h], k[:, g, j] @ params["pair_k"][g]), -1)
                for n in range(1, depth + 1):
                    x = torch.relu(x @ params[f"pair_{n}"] + params[f"pair_{n}_bias"])
                s[:, h, i, j] = (x @ params["pair_out"] + params["pair_out_bias"])[:, 0]
    return s


@pytest.mark.parametrize("kernel", ["slab", "reference"])
@pytest.mark.parametrize(("depth", "groups"), [(1, 4), (2, 4), (2, 2), (3, 1)])
def test_the_split_form_equals_the_concatenation(depth: int, groups: int, kernel: str) -> None:
    q, k, v = qkv(2, HEADS, 9, D, kv=groups)
    score = PairMLP(P, depth)
    params = drawn(score, groups)
    s = concatenated(q, k, params, depth).masked_fill(~below(9), -torch.inf)
    want = torch.softmax(s, -1) @ v.repeat_interleave(HEADS // groups, 1)
    found = sc.attend(q, k, v, f"causal + pair_mlp({P}, depth={depth})", params=params, kernel=kernel)
    torch.testing.assert_close(found, want, atol=1e-10, rtol=0)


def test_rows_in_tiles_equal_all_rows_at_once_and_their_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, HEADS, 300, D))
    params = {n: x.requires_grad_() for n, x in drawn(PairMLP(P)).items()}
    inputs = (q, k, v, *params.values())
    tiled = sc.attend(q, k, v, f"neural_attention({P})", params=params, kernel="slab")
    whole = sc.reference.attend(q, k, v, f"neural_attention({P})", params=params)
    torch.testing.assert_close(tiled, whole, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), inputs, allow_unused=True) for x in (tiled, whole)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_one_hidden_layer_is_the_additive_form_with_another_bend() -> None:
    """v.tanh(x) = v.(relu(x + 1) - relu(x - 1) - 1) where no |x| is above 1 and tanh is taken as straight there."""
    q, k, v = (1e-3 * x for x in qkv(1, HEADS, 7, D))
    params = drawn(PairMLP(P, 1))
    params["pair_1_bias"] = torch.ones(P, dtype=torch.float64)
    plain = {
        "additive_q": params["pair_q"] @ params["pair_1"][:P],
        "additive_k": params["pair_k"] @ params["pair_1"][P:],
        "additive_v": params["pair_out"][:, 0].expand(HEADS, P),
    }
    found = sc.attend(q, k, v, f"pair_mlp({P}, depth=1)", params=params)
    torch.testing.assert_close(
        found, sc.attend(q, k, v, f"additive({P})", params=plain), atol=1e-9, rtol=1e-5
    )


def test_decoding_equals_the_whole_call() -> None:
    layer = sc.nn.Attention(24, 4, "causal + neural_attention(3)").double()
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x), atol=1e-10, rtol=0)


def test_rotations_need_a_product() -> None:
    with pytest.raises(sc.MechanismError, match="rope needs bilinear, which pair_mlp breaks"):
        sc.mechanism("rope + neural_attention")


class Asker(nn.Module):
    """One head, two channels wide, that reads keys by their place; the answer is read off what it mixed."""

    def __init__(self, task: NearestKey, mechanism: str) -> None:
        super().__init__()
        self.attention = sc.nn.Attention(task.width, 1, mechanism, head_dim=2, value_dim=16, bias=True)
        self.answer = nn.Sequential(nn.Linear(task.width, 32), nn.GELU(), nn.Linear(32, task.values))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.answer(self.attention(tokens[:, -1:], tokens[:, :-1])[:, 0])


def nearest_key(mechanism: str, seed: int) -> float:
    """Accuracy of a trained asker on fresh rows."""
    torch.manual_seed(seed)
    task, generator = NearestKey(), torch.Generator().manual_seed(seed)
    model = Asker(task, mechanism)

    def loss(step: int) -> Tensor:
        tokens, values = task.batch(128, generator)
        return F.cross_entropy(model(tokens), values)

    train(model.parameters(), loss, 800, rate=1e-2)
    tokens, values = task.batch(2000, torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((model(tokens).argmax(-1) == values).float().mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_keys_on_a_line_are_told_by_distance_where_a_product_of_that_width_cannot(seed: int) -> None:
    assert nearest_key("neural_attention(8)", seed) >= 0.95
    assert nearest_key("full", seed) <= 0.75
