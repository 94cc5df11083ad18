"""A mixture of heads: every token chooses which heads it listens to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, system
from saccade.parts.base import Sizes, Stream, arg
from saccade.parts.output import Output

if TYPE_CHECKING:
    from saccade.parts.pair import Context


@dataclass(frozen=True)
class HeadGate(Output):
    """out times a gate: a softmax over the first `shared` heads, one over the others of which the `top` count.

    The streams are `router`, a number a head, whose softmax over each group gives the gates, and `split`, whose sigmoid is
    what the shared heads get of a token; the others get the rest. The loss `balance` is the sum over routed heads of the share
    of tokens that choose it times its mean probability, least when all are chosen alike. (Jin et al., MoH: Multi-Head
    Attention as Mixture-of-Head Attention, 2024.)
    """

    top: int = arg(2, at_least=1)
    shared: int = arg(1, at_least=0)

    name = "head_gate"

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        if self.shared + self.top > sizes.heads:
            raise MechanismError(
                f"head_gate: {self.shared} shared and {self.top} routed heads are more than {sizes.heads} heads"
            )
        router = {"router": Stream("q")}
        return router | {"split": Stream("q", per_head=False)} if self.shared else router

    def chosen(self, router: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of the routed heads, (b, heads - shared, L), and which of them are the `top`."""
        odds = torch.softmax(router[:, self.shared :], 1)
        best = odds.topk(self.top, dim=1).indices
        return odds, torch.zeros_like(odds, dtype=torch.bool).scatter(1, best, True)

    def gates(self, streams: dict[str, Tensor]) -> Tensor:
        """The gate of every head and token, (b, h, L)."""
        router = streams["router"]
        odds, kept = self.chosen(router)
        routed = odds * kept
        if not self.shared:
            return routed
        share = torch.sigmoid(streams["split"])
        return torch.cat((share * torch.softmax(router[:, : self.shared], 1), (1 - share) * routed), 1)

    def map(self, out: Tensor, c: Context) -> Tensor:
        return out * self.gates(c.streams).unsqueeze(-1).to(out.dtype)

    def losses(self, c: Context) -> dict[str, Tensor]:
        odds, kept = self.chosen(c.streams["router"])
        valid = c.query_valid
        if valid is not None:
            odds, kept = (x.transpose(1, 2)[valid].T[None] for x in (odds, kept))
        load = kept.to(odds.dtype).mean((0, 2))
        return {"balance": (load * odds.mean((0, 2))).sum()}


@system("moh", ref="S287")
def moh(top: int = 2, shared: int = 1) -> Pairwise:
    """Softmax attention in which a token hears `shared` heads always and the `top` best of the others, weighted by a router.

    All heads are computed: what is saved is what a head would disturb, not time. (Jin et al., MoH: Multi-Head Attention
    as Mixture-of-Head Attention, 2024.)
    """
    return Pairwise(output=(HeadGate(top, shared),))
