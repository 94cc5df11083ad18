"""Digits of 16 by 16 pixels as 64 patches, and a small ViT, for the checks of learned sparsity on images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.nn.transformer import Block
from saccade.tasks.digits import Digits
from systems.helpers import train

DATA = Digits(side=16)


class PatchViT(nn.Module):
    """64 patches of 2 by 2 pixels to a digit: blocks of attention, the mean over patches, a linear map."""

    def __init__(self, mechanism: str, dim: int = 32, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patches, self.positions = nn.Linear(4, dim), nn.Parameter(0.2 * torch.randn(64, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, sc.mechanism(mechanism)) for _ in range(depth))
        self.norm, self.digit = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 1, 16, 16) to tokens (B, 64, dim)."""
        return self.patches(F.unfold(images, 2, stride=2).transpose(1, 2)) + self.positions

    def forward(self, images: Tensor, losses: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (B, 10); what the mechanism asks training to add goes to `losses`."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, losses=losses)
        return self.digit(self.norm(x).mean(1))

    @torch.no_grad()
    def accuracy(self) -> float:
        """Test accuracy."""
        images, labels = DATA.test
        return float((self(images).argmax(-1) == labels).float().mean())


def taught(model: PatchViT, steps: int, seed: int, rate: float = 3e-3) -> PatchViT:
    """The model after training on labels."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        images, labels = DATA.batch(32, generator)
        return F.cross_entropy(model(images), labels)

    train(model.parameters(), loss, steps, rate)
    return model


def distilled(
    model: PatchViT, teacher: PatchViT, steps: int, seed: int, extra: Callable[[dict[str, Tensor]], Tensor]
) -> PatchViT:
    """The model, begun at its teacher's weights, after training on labels, the teacher's logits and its own losses."""
    model.load_state_dict(teacher.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        images, labels = DATA.batch(32, generator)
        losses: dict[str, Tensor] = {}
        logits = model(images, losses)
        with torch.no_grad():
            wanted = teacher(images).log_softmax(-1)
        apart = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        return F.cross_entropy(logits, labels) + apart + extra(losses)

    train(model.parameters(), loss, steps)
    return model


def nearest(count: int) -> Tensor:
    """The `count` patches nearest to each of the 64, itself included: (64, count)."""
    at = torch.arange(64)
    apart = (at[:, None] // 8 - at // 8).square() + (at[:, None] % 8 - at % 8).square()
    return apart.argsort(dim=-1, stable=True)[:, :count]


@torch.no_grad()
def captured(model: PatchViT, top: int) -> list[tuple[float, float]]:
    """The dense attention mass that each layer's choice holds, and that of the `top` nearest patches."""
    x, found = model.embed(DATA.test[0][:128]), []
    for block in model.blocks:
        layer = block.attention
        q, k, v = layer.project(block.norm1(x))
        w = sc.attend(q, k, v, "full", need=("weights",)).weights
        params = {n: layer.get_parameter(n) for n in layer.weight_names}
        buffers = {n: layer.get_buffer(n) for n in layer.mechanism.buffer_names()}
        chosen = sc.attend(
            q, k, v, layer.mechanism, params=params, buffers=buffers, need=("selection",)
        ).selection
        local = nearest(top).expand(*w.shape[:2], -1, -1)
        held = (w.gather(-1, chosen.index) * chosen.valid).sum(-1)
        found.append((float(held.mean()), float(w.gather(-1, local).sum(-1).mean())))
        x = block(x)
    return found
