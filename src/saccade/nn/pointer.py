"""A network whose answers are positions of its input, written one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.errors import NotSupported
from saccade.mechanism import Mechanism, Pairwise
from saccade.mechanism import mechanism as parse
from saccade.nn.beam import beam_search
from saccade.nn.transformer import Block
from saccade.parts.base import Sizes
from saccade.parts.pair import Context, Program

Reading = tuple[Tensor, Tensor, Tensor]
"""The reader's state (1, N, dim) twice, and the choices taken (N, choices + 1), the last of them the start."""


class PointerNetwork(nn.Module):
    """Elements (B, n, width) and indices (B, L) to logits (B, L, n) of the index that each place holds.

    Encoder blocks read the elements as a set; an LSTM reads the elements chosen so far, and its state asks the encoded
    ones by `mechanism`, whose logits are the answer. No index is chosen twice. With `ends` there is one more choice,
    index n, which ends a sequence: logits are (B, L, n + 1). (Vinyals, Fortunato and Jaitly, Pointer Networks, 2015.)

    >>> model = PointerNetwork(width=2, dim=16)
    >>> model(torch.zeros(3, 5, 2), torch.arange(5).expand(3, -1)).shape
    torch.Size([3, 5, 5])
    >>> model.greedy(torch.rand(3, 5, 2)).sort(1).values[0].tolist()
    [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        width: int,
        dim: int = 64,
        *,
        depth: int = 1,
        heads: int = 4,
        encoder: str | Mechanism = "full",
        mechanism: str | Mechanism = "additive(64)",
        ends: bool = False,
    ) -> None:
        super().__init__()
        m = parse(mechanism)
        if not isinstance(m, Pairwise) or m.streams(Sizes(1, 1, dim, dim)) or m.buffer_names():
            raise NotSupported(
                f"{m} gives no plain logits of a query and a key; use additive, bilinear or dot"
            )
        self.mechanism, self.ends = m, ends
        self.embedding = nn.Linear(width, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, parse(encoder)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.reader = nn.LSTM(dim, dim, batch_first=True)
        self.start, self.end = (nn.Parameter(torch.randn(1, 1, dim) * 0.1) for _ in range(2))
        declared = m.weights(Sizes(1, 1, dim, dim))
        self.weights = nn.ParameterDict({n: nn.Parameter(w.make()) for n, w in declared.items()})

    def encode(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        """What can be pointed at, as the decoder is fed it and as it is asked, both (B, choices, dim)."""
        fed = self.embedding(elements)
        asked = fed
        for block in self.blocks:
            asked = block(asked)
        asked = self.norm(asked)
        if self.ends:
            fed, asked = (torch.cat((x, self.end.expand(len(x), -1, -1)), 1) for x in (fed, asked))
        return fed, asked

    def forward(self, elements: Tensor, indices: Tensor) -> Tensor:
        """Logits of every place given the indices before it; -inf where an index was chosen already.

        Indices below 0 fill up short rows; what stands there does not matter.
        """
        fed, asked = self.encode(elements)
        before = indices[:, :-1].clamp_min(0)
        chosen = fed.gather(1, before.unsqueeze(-1).expand(-1, -1, fed.shape[-1]))
        states, _ = self.reader(torch.cat((self.start.expand(len(fed), -1, -1), chosen), 1))
        taken = nn.functional.one_hot(before, fed.shape[1]).cumsum(1)
        taken = nn.functional.pad(taken, (0, 0, 1, 0)) > 0
        return self.point(states, asked, taken)

    def point(self, states: Tensor, asked: Tensor, taken: Tensor) -> Tensor:
        """Logits (B, L, choices) of decoder states (B, L, dim); `taken` marks what may not be chosen again, the end apart."""
        if self.ends:
            taken = torch.cat((taken[..., :-1], torch.zeros_like(taken[..., -1:])), -1)
        keys = asked[:, None]
        c = Context(states[:, None], keys, keys, mask=~taken[:, None], params=dict(self.weights.items()))
        program = Program.bind(self.mechanism, c)
        return program.logits(program.tile(slice(0, states.shape[1]), [(0, asked.shape[1])]))[:, 0]

    def greedy(self, elements: Tensor, length: int | None = None) -> Tensor:
        """The likeliest index, place by place, (B, length): of all elements, or up to the end and filled up with it."""
        return self.beam(elements, 1, length)[0]

    def beam(self, elements: Tensor, width: int, length: int | None = None) -> tuple[Tensor, Tensor]:
        """The likeliest of the sequences that a beam of `width` keeps, (B, length), and its log-probability (B,).

        `length` is the number of elements unless given, and one more with an end. Sequences hold no index twice; one that
        has ended holds the end from there on. Raises ValueError for a width below 1 or more places than elements.
        """
        count = elements.shape[1]
        length = count + self.ends if length is None else length
        if width < 1 or not 1 <= length <= count + self.ends:
            raise ValueError(
                f"a beam has a width of at least 1 and 1 to {count + self.ends} places for {count} elements, got width "
                f"{width} and {length} places"
            )
        with torch.no_grad():
            fed, asked = self.encode(elements)
        choices = fed.shape[1]
        words = torch.cat((fed, self.start.expand(len(fed), -1, -1)), 1).repeat_interleave(width, 0)
        asked = asked.repeat_interleave(width, 0)
        rows = torch.arange(len(words), device=fed.device)

        def step(index: Tensor, state: Reading) -> tuple[Tensor, Reading]:
            hidden, cell, taken = state
            taken = taken.scatter(1, index[:, None], True)
            out, (hidden, cell) = self.reader(words[rows, index][:, None], (hidden, cell))
            logits = self.point(out, asked, taken[:, None, :choices])[:, 0]
            return logits.log_softmax(-1), (hidden, cell, taken)

        blank = fed.new_zeros(1, len(words), fed.shape[2])
        taken = torch.zeros(len(words), choices + 1, dtype=torch.bool, device=fed.device)
        first = torch.full((len(fed),), choices, device=fed.device)
        end = count if self.ends else None
        return beam_search(step, _select, (blank, blank, taken), first, width, length, end)


def _select(state: Reading, rows: Tensor) -> Reading:
    hidden, cell, taken = state
    return hidden[:, rows], cell[:, rows], taken[rows]
