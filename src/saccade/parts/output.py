"""Maps on the mixed head vectors, one token at a time; any family takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.parts.base import Part, Sizes, Stream, Weight, arg

if TYPE_CHECKING:
    from saccade.parts.pair import Context


class Output(Part):
    """A map on the output of a row."""

    kind = "output"

    def map(self, out: Tensor, c: Context) -> Tensor:
        """out (b, h, L, e) to the same shape; `c` holds params, and streams of the query side for these rows."""
        raise NotImplementedError


@dataclass(frozen=True)
class OutNorm(Output):
    """out / rms(out) times a learned gain (Zhang and Sennrich, Root Mean Square Layer Normalization, 2019)."""

    eps: float = arg(1e-6, above=0.0)

    name = "out_norm"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        return {"out_norm": Weight((sizes.heads, sizes.value_dim), init="ones")}

    def map(self, out: Tensor, c: Context) -> Tensor:
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * c.params["out_norm"][:, None].to(wide.dtype)).to(out.dtype)


@dataclass(frozen=True)
class OutGate(Output):
    """out times sigmoid of a stream, one number a head and token (Qiu et al., Gated Attention for LLMs, 2025).

    With `rest` it is times what is left of 1: two members of a mix with shares (1, 1) then divide one gate.
    """

    rest: bool = False

    name = "out_gate"

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"out_gate": Stream("q")}

    def map(self, out: Tensor, c: Context) -> Tensor:
        gate = c.streams["out_gate"]
        return out * torch.sigmoid(-gate if self.rest else gate).unsqueeze(-1).to(out.dtype)
