"""S024, Set Transformer: order does not matter, inducing points cost linear time, sets yield their maximum and clusters."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import saccade as sc
from systems.helpers import exponent, flops, train

pytestmark = pytest.mark.system("S024")


@pytest.mark.parametrize("inducing", [0, 5])
def test_the_encoder_moves_with_the_order_and_the_answer_does_not(inducing: int) -> None:
    model = sc.nn.SetTransformer(3, 2, outputs=4, dim=16, heads=4, inducing=inducing)
    x = torch.randn(2, 30, 3)
    order = torch.randperm(30)
    torch.testing.assert_close(model.encode(x[:, order]), model.encode(x)[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x[:, order]), model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("inducing", [0, 5])
def test_padding_does_not_matter(inducing: int) -> None:
    model = sc.nn.SetTransformer(3, 2, outputs=4, dim=16, heads=4, inducing=inducing)
    x = torch.randn(2, 30, 3)
    mask = torch.rand(2, 30) < 0.5
    found = model(x.masked_fill(~mask[..., None], math.nan), mask)
    for n in range(2):
        torch.testing.assert_close(found[n], model(x[n, mask[n]][None])[0], atol=1e-5, rtol=0)


def test_inducing_points_cost_linear_work_and_all_pairs_quadratic() -> None:
    sizes = [1024, 2048, 4096]
    blocks = (sc.nn.ISAB(16, 2, inducing=16), sc.nn.SAB(16, 2))
    with sdpa_kernel(SDPBackend.MATH):
        slopes = [
            exponent(
                sizes,
                [
                    flops(lambda n=n, block=block: block.requires_grad_(False)(torch.randn(1, n, 16)))
                    for n in sizes
                ],
            )
            for block in blocks
        ]
    print(f"slopes of work: ISAB {slopes[0]:.2f}, SAB {slopes[1]:.2f}")
    assert slopes[0] <= 1.2
    assert slopes[1] >= 1.7


class DeepSets(nn.Module):
    """A map of each element, their mean, a map of it: (B, n, features) to (B, outputs, width)."""

    def __init__(self, features: int, width: int, outputs: int = 1, dim: int = 64) -> None:
        super().__init__()
        self.outputs, self.width = outputs, width
        self.each = nn.Sequential(
            nn.Linear(features, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )
        self.whole = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, outputs * width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found = self.each(x)
        mean = found.mean(1) if mask is None else (found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.whole(mean).unflatten(-1, (self.outputs, self.width))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def numbers(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Padded sets of 1 to 10 whole numbers up to 100, in units of 100, their mask and their maximum."""
    x = torch.randint(1, 101, (count, 10, 1), generator=generator) / 100
    mask = torch.arange(10) < torch.randint(1, 11, (count, 1), generator=generator)
    return x, mask, x.squeeze(-1).masked_fill(~mask, 0).amax(1)


def maximum_error(model: nn.Module, steps: int) -> float:
    """Mean absolute error of the maximum, in units of 100, after training."""
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        x, mask, most = numbers(128, generator)
        return (model(x, mask)[:, 0, 0] - most).abs().mean()

    train(model.parameters(), loss, steps, rate=3e-3)
    x, mask, most = numbers(2000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(x, mask)[:, 0, 0] - most).abs().mean())


def test_the_maximum_of_a_set_is_learned_and_not_by_mean_pooling() -> None:
    model, plain = sc.nn.SetTransformer(1, 1, dim=32, inducing=0, depth=1), DeepSets(1, 1, dim=96)
    assert size(model) < size(plain)
    found, other = maximum_error(model, 300), maximum_error(plain, 300)
    print(f"maximum: Set Transformer {found:.4f}, DeepSets {other:.4f}")
    assert found <= 0.5 * other


def mixtures(count: int, points: int, groups: int, generator: torch.Generator) -> Tensor:
    """Points (count, points, 2) of `groups` normal clusters, 0.3 wide, with middles in [-4, 4] and uneven shares."""
    middles = 8 * torch.rand(count, groups, 2, generator=generator) - 4
    shares = torch.empty(count, groups).exponential_(generator=generator)
    which = torch.multinomial(shares, points, replacement=True, generator=generator)
    near = middles.gather(1, which[..., None].expand(-1, -1, 2))
    return near + 0.3 * torch.randn(count, points, 2, generator=generator)


def likelihood(x: Tensor, found: Tensor) -> Tensor:
    """Mean log-density of points (B, n, 2) under mixtures (B, groups, 5): log share, middle, log width an axis."""
    share, middle, width = found[..., 0].log_softmax(-1), found[..., 1:3], found[..., 3:].clamp(-3, 3)
    z = (x[:, :, None] - middle[:, None]) * (-width[:, None]).exp()
    each = -0.5 * z.square().sum(-1) - width.sum(-1)[:, None] - math.log(2 * math.pi)
    return torch.logsumexp(share[:, None] + each, dim=-1).mean()


def clustered(model: nn.Module, steps: int, groups: int, points: int, batch: int = 32) -> float:
    """Log-likelihood a point, in nats, on fresh sets."""
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        x = mixtures(batch, points, groups, generator)
        return -likelihood(x, model(x))

    train(model.parameters(), loss, steps, rate=2e-3)
    x = mixtures(300, points, groups, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(likelihood(x, model(x)))


def test_clusters_are_found_better_than_by_mean_pooling() -> None:
    found = clustered(sc.nn.SetTransformer(2, 5, 4, dim=32, inducing=8), 250, groups=4, points=40)
    plain = clustered(DeepSets(2, 5, 4, dim=128), 250, groups=4, points=40)
    print(f"four clusters, nats a point: Set Transformer {found:.3f}, DeepSets {plain:.3f}")
    assert found >= plain + 0.1


@pytest.mark.slow
def test_clusters_are_found_nearly_as_well_as_by_em() -> None:
    found = clustered(sc.nn.SetTransformer(2, 5, 4, dim=32, inducing=8), 2000, groups=4, points=60)
    sets = mixtures(300, 60, 4, torch.Generator().manual_seed(1)).numpy()
    em = sum(
        GaussianMixture(4, covariance_type="diag", random_state=0, n_init=3).fit(x).score(x) for x in sets
    ) / len(sets)
    print(f"four clusters, nats a point: Set Transformer {found:.3f}, EM {em:.3f}")
    assert found >= em - 0.4
