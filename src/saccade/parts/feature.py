"""Feature maps: weights as dot products of mapped queries and keys, so that a state can stand for all keys.

A feature map answers (phi, log_scale): the true feature is phi * exp(log_scale). Keeping the scale apart keeps
exponential features finite at any input, and cancels exactly in a ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.errors import MechanismError, NotSupported
from saccade.parts.base import Part, Sizes, arg


class Feature(Part):
    """A map on head vectors of queries and keys."""

    kind = "feature"

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """x (b, heads, n, d) to phi (b, heads, n, m) and log_scale (b, heads, n) or None; valid is (b, n) or None."""
        raise NotImplementedError

    def size(self, head_dim: int) -> int:
        """The feature size m."""
        return head_dim

    def flops(self, head_dim: int) -> int:
        """Matrix FLOPs of mapping one head vector."""
        return 0

    def place(self, phi: Tensor, positions: Tensor) -> Tensor:
        """phi (b, heads, n, m) of tokens at `positions` (b or 1, n); as it is unless the map knows positions."""
        return phi


@dataclass(frozen=True)
class Identity(Feature):
    """phi(x) = x."""

    name = "identity"
    gives = frozenset({"bilinear", "channelwise"})

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return x, None


@dataclass(frozen=True)
class Elu1(Feature):
    """phi(x) = elu(x) + 1 (Katharopoulos et al., Transformers are RNNs, 2020)."""

    name = "elu1"
    gives = frozenset({"channelwise", "denominator", "positive"})

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return torch.nn.functional.elu(x) + 1, None


@dataclass(frozen=True)
class ReluFeature(Feature):
    """phi(x) = max(x, 0)^power; a query that meets no key answers zeros (Kasai et al., Finetuning Pretrained Transformers into RNNs, 2021)."""

    power: float = arg(1.0, at_least=1.0)

    name = "relu_feature"
    gives = frozenset({"channelwise", "denominator", "positive"})

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return torch.relu(x) ** self.power, None


@dataclass(frozen=True)
class CosineFeature(Feature):
    """phi(q_i).phi(k_j) = relu(q_i).relu(k_j) cos(pi (i - j) / (2 length)): near keys weigh more; at most `length` tokens.

    (Qin et al., cosFormer: Rethinking Softmax in Attention, 2022.)
    """

    length: int = arg(1024, at_least=1)

    name = "cosine_feature"
    gives = frozenset({"denominator", "positive"})

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return torch.cat((torch.relu(x), torch.zeros_like(x)), -1), None

    def place(self, phi: Tensor, positions: Tensor) -> Tensor:
        if positions.numel() and int(positions.max()) >= self.length:
            raise NotSupported(
                f"cosine_feature({self.length}) reads at most {self.length} tokens, beyond which weights are negative, got a "
                f"token at place {int(positions.max()) + 1}; give it a greater length"
            )
        angle = (positions * (math.pi / 2 / self.length)).to(phi.dtype)[:, None, :, None]
        x, y = phi.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((x * cos - y * sin, x * sin + y * cos), -1)

    def size(self, head_dim: int) -> int:
        return 2 * head_dim


@dataclass(frozen=True)
class Taylor(Feature):
    """phi(q).phi(k) = 1 + s, and + s^2 / 2 in second order, with s = q.k scale; scale is 1/sqrt(d) unless given.

    A product of two channels stands once, times sqrt(2): 1 + d + d (d + 1) / 2 features in place of 1 + d + d^2. In first
    order weights may be negative. (Arora et al., Simple linear attention language models balance the recall-throughput
    tradeoff, 2024.)
    """

    order: int = arg(2, at_least=1)
    scale: float | None = arg(None, above=0.0)

    name = "taylor"
    gives = frozenset({"denominator", "positive"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order > 2:
            raise MechanismError(f"taylor: order must be 1 or 2, got {self.order}; for all orders use favor")

    @property
    def breaks(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.order == 2 else frozenset({"denominator", "positive"})

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        d = x.shape[-1]
        x = x * (d**-0.25 if self.scale is None else self.scale**0.5)
        pieces = [torch.ones_like(x[..., :1]), x]
        if self.order == 2:
            pieces.append(x.square() * 0.5**0.5)
            pieces += [x[..., c : c + 1] * x[..., c + 1 :] for c in range(d - 1)]
        return torch.cat(pieces, -1), None

    def size(self, head_dim: int) -> int:
        return 1 + head_dim + (head_dim * (head_dim + 1) // 2 if self.order == 2 else 0)


def orthogonal_gaussian(rows: int, dim: int, generator: torch.Generator | None) -> Tensor:
    """Gaussian rows (rows, dim) that are exactly orthogonal within blocks of `dim`."""
    blocks = []
    for start in range(0, rows, dim):
        basis, upper = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        basis = basis * upper.diagonal().sign()
        norms = torch.randn(dim, dim, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
        blocks.append((basis.T * norms)[: rows - start])
    return torch.cat(blocks).float()


@dataclass(frozen=True)
class Favor(Feature):
    """phi(x) = exp(W x - |x|^2 / 2) / sqrt(m), x scaled by d^(-1/4): an unbiased estimate of the softmax kernel.

    W is the buffer `favor` (heads, features, d), orthogonal within blocks or independent; drawing it anew is an
    explicit refresh. (Choromanski et al., Rethinking Attention with Performers, 2021.)
    """

    features: int = arg(64, at_least=1)
    rows: str = arg("orthogonal", choices=("orthogonal", "independent"))

    name = "favor"
    buffer_names = ("favor",)
    needs = frozenset({"ratio"})
    gives = frozenset({"denominator", "positive"})

    def buffers(self, sizes: Sizes, generator: torch.Generator | None) -> dict[str, Tensor]:
        shape = (sizes.kv_heads, self.features, sizes.head_dim)
        if self.rows == "independent":
            return {"favor": torch.randn(shape, generator=generator)}
        return {
            "favor": torch.stack(
                [orthogonal_gaussian(self.features, sizes.head_dim, generator) for _ in range(sizes.kv_heads)]
            )
        }

    def refresh(
        self,
        buffers: dict[str, Tensor],
        q: Tensor,
        k: Tensor,
        valid: Tensor | None,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        return self.buffers(Sizes(q.shape[1], buffers["favor"].shape[0], q.shape[-1], q.shape[-1]), generator)

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        w = buffers["favor"].to(x.dtype)
        if x.shape[1] % w.shape[0] or w.shape[1:] != (self.features, x.shape[-1]):
            raise NotSupported(
                f"favor({self.features}) needs a buffer `favor` (key-value heads, {self.features}, {x.shape[-1]}), "
                f"got {tuple(w.shape)} for {x.shape[1]} heads"
            )
        w = w.repeat_interleave(x.shape[1] // w.shape[0], dim=0)
        x = x * x.shape[-1] ** -0.25
        exponent = x @ w.transpose(-1, -2) - x.square().sum(-1, keepdim=True) / 2
        scale = exponent.detach().amax(-1)
        return torch.exp(exponent - scale.unsqueeze(-1)) * self.features**-0.5, scale

    def size(self, head_dim: int) -> int:
        return self.features

    def flops(self, head_dim: int) -> int:
        return 2 * head_dim * self.features


@dataclass(frozen=True)
class SoftmaxFeature(Feature):
    """Queries: softmax over channels. Keys: exp, to be normalised over tokens a channel (Shen et al., Efficient Attention, 2021)."""

    name = "softmax_feature"
    causal = "never"
    relative = "linear or performer_favor"

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if side == "q":
            return torch.softmax(x, dim=-1), None
        if valid is not None:
            x = x.masked_fill(~valid[:, None, :, None], -torch.inf)
        top = x.detach().amax(2, keepdim=True) if x.shape[2] else x.new_zeros(())
        return torch.exp(x - torch.nan_to_num(top, neginf=0.0)), None


@dataclass(frozen=True)
class LengthScaled(Feature):
    """phi(x) = x / sqrt(number of keys) (Shen et al., Efficient Attention, 2021: the scaling form)."""

    name = "length_scaled"
    causal = "never"
    relative = "identity"

    def map(
        self, x: Tensor, side: Literal["q", "k"], valid: Tensor | None, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if side == "q":
            return x, None
        count = (
            x.new_full((1, 1, 1, 1), max(1, x.shape[2]))
            if valid is None
            else valid.sum(-1).clamp_min(1).to(x.dtype)[:, None, None, None]
        )
        return x / count, None
