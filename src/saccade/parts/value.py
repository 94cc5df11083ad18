"""What a row mixes besides its values: a term that each pair brings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from saccade.parts.base import Part

if TYPE_CHECKING:
    from saccade.parts.pair import Tile


class Value(Part):
    """A term of the output, linear in the weights, beside the mix of values."""

    kind = "value"

    def tile(self, w: Tensor, t: Tile) -> Tensor:
        """Weights (b, h, Q, K) of a tile to what they add to its output, (b, h, Q, e)."""
        raise NotImplementedError
