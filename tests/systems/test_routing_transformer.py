"""S194, Routing Transformer: attention inside buckets of tokens that share a centroid."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from systems.helpers import below, dense, exponent, flops, qkv, stepwise

pytestmark = pytest.mark.system("S194")


def standardised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def unit(heads: int, clusters: int, dim: int) -> dict[str, Tensor]:
    return {"centroids": F.normalize(torch.randn(heads, clusters, dim), dim=-1)}


def test_one_bucket_is_full_causal_attention() -> None:
    q, k, v = qkv(2, 3, 40, 8)
    found = sc.attend(q, k, v, "routing_transformer(1, local=false)", buffers=unit(3, 1, 8))
    expected = dense(standardised(q), standardised(k), v, below(40))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_buckets_equal_the_formula() -> None:
    q, k, v = qkv(2, 2, 24, 8)
    buffers = unit(2, 3, 8)
    found = sc.attend(q, k, v, "routing_transformer(3, local=false)", buffers=buffers)
    q, k = standardised(q), standardised(k)
    for b in range(2):
        for h in range(2):
            out, taken = torch.zeros(24, 8, dtype=torch.float64), torch.zeros(24)
            for centroid in buffers["centroids"][h].double():
                rows, cols = ((x[b, h] @ centroid).topk(8).indices.sort().values for x in (q, k))
                for i in rows.tolist():
                    taken[i] += 1
                    near = cols[cols <= i]
                    if len(near):
                        w = torch.softmax(k[b, h, near] @ q[b, h, i] / math.sqrt(8), 0)
                        out[i] += w @ v[b, h, near]
            torch.testing.assert_close(found[b, h], out / taken.clamp_min(1)[:, None], atol=1e-10, rtol=0)


def test_the_first_half_of_the_heads_reads_a_window() -> None:
    q, k, v = qkv(2, 4, 50, 8)
    buffers = unit(4, 5, 8)
    found = sc.attend(q, k, v, "routing_transformer(5, window=7)", buffers=buffers)
    local = sc.attend(*(x[:, :2] for x in (q, k, v)), "window(7)")
    last = {"centroids": buffers["centroids"][2:]}
    routed = sc.attend(*(x[:, 2:] for x in (q, k, v)), "routing_transformer(5, local=false)", buffers=last)
    torch.testing.assert_close(found, torch.cat((local, routed), 1), atol=1e-12, rtol=0)


def together(index: Tensor, n: int) -> Tensor:
    """Which tokens share a bucket, (b, h, n, n), from bucket members (b, h, C, w)."""
    member = torch.zeros(*index.shape[:3], n).scatter(-1, index, 1.0)
    return torch.einsum("bhcn,bhcm->bhnm", member, member) > 0


class Planted:
    """Tokens around eight directions, and a layer whose keys are its queries, as the causal algorithm sets them."""

    def __init__(self, seed: int, dim: int = 64, heads: int = 4) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(8, dim, generator=self.generator)
        torch.manual_seed(seed)
        self.layer = sc.nn.Attention(
            dim, heads, "routing_transformer(8, local=false)", generator=self.generator
        )
        assert self.layer.query_proj is not None
        self.layer.query_proj.load_state_dict(self.layer.key_proj.state_dict())

    def draw(self, batch: int = 4, n: int = 256) -> tuple[Tensor, Tensor]:
        labels = torch.stack([torch.randperm(n, generator=self.generator) % 8 for _ in range(batch)])
        noise = torch.randn(batch, n, self.centres.shape[1], generator=self.generator)
        return self.centres[labels] + 0.3 * noise, labels

    def shared(self) -> float:
        """The share of same-cluster pairs that sit in one bucket."""
        x, labels = self.draw()
        chosen = self.layer(x, need=("out", "selection")).selection
        same = (labels[:, :, None] == labels[:, None]) & ~torch.eye(x.shape[1], dtype=torch.bool)
        return float(together(chosen.k, x.shape[1]).transpose(0, 1)[:, same].float().mean())


def test_refreshed_centroids_gather_planted_clusters() -> None:
    """A moving average alone leaves centroids that own no cluster and others that own two."""
    before, after = [], []
    for seed in range(4):
        planted = Planted(seed)
        before.append(planted.shared())
        for _ in range(200):
            planted.layer.refresh(planted.draw()[0])
        after.append(planted.shared())
    assert sum(before) / 4 < 0.6
    assert min(after) >= 0.75
    assert planted.layer.centroids.norm(dim=-1).sub(1).abs().max() < 1e-5


def test_score_entries_grow_as_the_length_to_one_and_a_half() -> None:
    lengths, entries, planned, counted = [256, 1024, 4096], [], [], []
    for n in lengths:
        clusters = math.isqrt(n)
        text = f"routing_transformer({clusters}, local=false)"
        q, k, v = qkv(1, 1, n, 16, dtype=torch.float32)
        buffers = unit(1, clusters, 16)
        chosen = sc.attend(q, k, v, text, buffers=buffers, need=("out", "selection")).selection
        pairs = chosen.q[..., :, None] >= chosen.k[..., None, :]
        entries.append(int(pairs.sum()))
        assert chosen.q.shape == (1, 1, clusters, n // clusters)
        planned.append(sc.plan(text, (1, 1, n, 16)).cost.flops)
        counted.append(flops(lambda q=q, k=k, v=v, t=text, b=buffers: sc.attend(q, k, v, t, buffers=b)))
    for costs in (entries, planned, counted):
        assert 1.4 <= exponent(lengths, costs) <= 1.6
    assert planned[-1] < sc.plan("causal", (1, 1, 4096, 16)).cost.flops / 4


def test_the_plan_says_that_training_reads_the_future() -> None:
    m = sc.mechanism("routing_transformer(8)")
    assert m.causal
    assert m.causality == "leak"
    assert "reads the future in training" in str(sc.plan(m, (1, 4, 256, 16)))


def test_membership_leaks_and_values_do_not() -> None:
    q, k, v = qkv(1, 2, 64, 8)
    buffers, text = unit(2, 8, 8), "routing_transformer(8, local=false)"
    first = sc.attend(q, k, v, text, buffers=buffers, need=("out", "selection"))
    later = (torch.arange(64) >= 48)[:, None]
    q2, k2, v2 = (torch.where(later, torch.randn_like(x), x) for x in (q, k, v))
    moved = sc.attend(q2, k2, v2, text, buffers=buffers)
    assert (moved - first.out)[:, :, :48].abs().max() > 1e-3
    frozen = sc.attend(q2, k2, v2, text, buffers=buffers, selection=first.selection)
    torch.testing.assert_close(frozen[:, :, :48], first.out[:, :, :48], atol=1e-12, rtol=0)


def test_decoding_reads_no_future_and_differs_from_training() -> None:
    """In decoding a token attends to earlier tokens with its own nearest centroid."""
    planted = Planted(0)
    for _ in range(200):
        planted.layer.refresh(planted.draw()[0])
    x, _ = planted.draw(batch=1, n=64)
    with torch.no_grad():
        whole, (steps, _) = planted.layer(x), stepwise(planted.layer, x)
        again, _ = stepwise(planted.layer, torch.cat((x[:, :40], torch.randn(1, 24, 64)), 1))
        q, k, v = (standardised(y) if n < 2 else y for n, y in enumerate(planted.layer.project(x)))
        near_q, near_k = ((y @ planted.layer.centroids.transpose(-1, -2)).argmax(-1) for y in (q, k))
        same = (near_q[..., :, None] == near_k[..., None, :]) & below(64)
        expected = planted.layer.out_proj(dense(q, k, v, same).transpose(1, 2).flatten(2))
    torch.testing.assert_close(steps[:, :40], again[:, :40], atol=1e-5, rtol=0)
    torch.testing.assert_close(steps[:, 1:], expected[:, 1:], atol=1e-5, rtol=0)
    gap = float((steps - whole).norm() / whole.norm())
    assert 0.2 < gap < 0.6
