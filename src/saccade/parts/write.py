"""How a key and a value enter a state.

Legend: b batch, g state heads, n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import softplus

from saccade.errors import MechanismError
from saccade.parts.base import Part, Sizes, Stream, arg
from saccade.parts.decay import STEP, by_state

if TYPE_CHECKING:
    from saccade.parts.pair import Context


class Write(Part):
    """What a token writes; without one it adds phi(k) v."""

    kind = "write"
    overwrites: ClassVar[bool] = False

    def gain(self, c: Context) -> Tensor:
        """The strength of each token's writing, (b, g, n), in float32 or wider."""
        raise NotImplementedError


@dataclass(frozen=True)
class StepWrite(Write):
    """softplus(x) phi(k) v with the x of `step_decay` (Dao and Gu, Transformers are SSMs: Mamba-2, 2024)."""

    name = "step_write"

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"step": STEP}

    def gain(self, c: Context) -> Tensor:
        return softplus(by_state(c.streams["step"], c.k.shape[1]))


@dataclass(frozen=True)
class Delta(Write):
    """beta phi(k) (v - what the state answers to phi(k)), beta = most sigmoid(x): a key's old value makes room for its new one.

    Keys of length one are meant, as `unit` makes them; `most` up to 2 lets a key flip what it holds. (Schlag et al., Linear
    Transformers Are Secretly Fast Weight Programmers, 2021; Yang et al., Gated Delta Networks, 2025.)
    """

    most: float = arg(1.0, above=0.0)

    name = "delta"
    overwrites = True
    breaks = frozenset({"denominator"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most > 2:
            raise MechanismError(f"delta: above 2 a state grows without bound, got most={self.most:g}")

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"beta": Stream("k")}

    def gain(self, c: Context) -> Tensor:
        return self.most * by_state(c.streams["beta"], c.k.shape[1]).sigmoid()
