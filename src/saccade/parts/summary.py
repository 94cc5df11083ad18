"""Fewer keys than tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import NotSupported
from saccade.parts.base import Part, Sizes, Weight, arg


class Summary(Part):
    """Replace the keys and values of S tokens by those of fewer rows."""

    kind = "summary"

    def reduce(
        self, k: Tensor, v: Tensor, valid: Tensor | None, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """k (b, g, S, d), v (b, g, S, e) and valid (b, S) or None to k (b, g, M, d), v (b, g, M, e)."""
        raise NotImplementedError

    def rows(self, keys: int) -> int:
        """How many rows `keys` tokens become."""
        raise NotImplementedError


@dataclass(frozen=True)
class LengthProject(Summary):
    """k' = E k and v' = F v with learned E, F (rows, length), one pair a key-value head (Wang et al., Linformer, 2020).

    The length is fixed: longer input is refused, shorter input uses the first columns.
    """

    rank: int = arg(64, at_least=1)
    length: int = arg(512, at_least=1)

    name = "length_project"
    causal = "never"
    relative = "performer_favor or moba"

    def weights(self, sizes: Sizes) -> dict[str, Weight]:
        shape = (sizes.kv_heads, self.rank, self.length)
        std = self.rank**-0.5
        return {"project_k": Weight(shape, std=std), "project_v": Weight(shape, std=std)}

    def reduce(
        self, k: Tensor, v: Tensor, valid: Tensor | None, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        n = k.shape[2]
        if n > self.length:
            raise NotSupported(
                f"length_project was made for at most {self.length} tokens, got {n}; make it with length={n} or use {self.relative}"
            )
        if valid is not None:
            gone = ~valid[:, None, :, None]
            k, v = k.masked_fill(gone, 0), v.masked_fill(gone, 0)
        e, f = (params[name][..., :n].to(k.dtype) for name in ("project_k", "project_v"))
        return torch.matmul(e, k), torch.matmul(f, v)

    def rows(self, keys: int) -> int:
        return self.rank
