"""What decoding carries from token to token; it saves to and loads from safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


class Arena:
    """Room for keys or values that grows by doubling; appending to the newest state moves nothing."""

    def __init__(self, x: Tensor) -> None:
        b, g, n, d = x.shape
        self.room = x.new_empty(b, g, max(16, 2 * n), d)
        self.room[:, :, :n] = x
        self.filled = n

    def append(self, old: Tensor, new: Tensor) -> Tensor | None:
        """`old` followed by `new` in place, or None when the room is full or `old` has grown by something else."""
        n, more = old.shape[2], new.shape[2]
        if n + more > self.room.shape[2]:
            return None
        if n < self.filled:
            held = self.room[:, :, n : n + more]
            same = n + more <= self.filled and held.dtype == new.dtype and torch.equal(held, new)
            return self.room[:, :, : n + more] if same else None
        self.room[:, :, n : n + more] = new
        self.filled = n + more
        return self.room[:, :, : n + more]


@dataclass(frozen=True)
class State:
    """The memory of a mechanism after `length` tokens.

    A pairwise mechanism keeps prepared keys and values of the positions from `start` on, a recurrent one its state,
    a combination the states of its members. `nbytes` counts what is really held.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    length: int = 0
    start: int = 0
    members: tuple[State, ...] = ()
    room: dict[str, Arena] = field(default_factory=dict, repr=False, compare=False)

    def appended(self, **new: Tensor) -> State:
        """The state after new tokens (b, g, n, d) for each tensor: in place while no gradient is needed and no other
        state has grown from this one by other tokens, a copy otherwise."""
        tensors, room = {}, {}
        for name, x in new.items():
            old = self.tensors[name]
            if not old.shape[2] or (torch.is_grad_enabled() and (old.requires_grad or x.requires_grad)):
                tensors[name] = torch.cat((old, x), dim=2) if old.shape[2] else x
                continue
            joined = self.room[name].append(old, x) if name in self.room else None
            room[name] = self.room[name] if joined is not None else Arena(torch.cat((old, x), dim=2))
            tensors[name] = joined if joined is not None else room[name].room[:, :, : room[name].filled]
        added = next(iter(new.values())).shape[2]
        return State(tensors, self.length + added, self.start, self.members, room)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, those of the members included."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values()) + sum(
            m.nbytes for m in self.members
        )

    def select(self, rows: Tensor) -> State:
        """The state of these rows of the batch, in this order: a beam goes on from the best of its rows."""
        return State(
            {n: x.index_select(0, rows) for n, x in self.tensors.items()},
            self.length,
            self.start,
            tuple(m.select(rows) for m in self.members),
        )

    def detach(self) -> State:
        """The same state outside the autograd graph."""
        return State(
            {n: x.detach() for n, x in self.tensors.items()},
            self.length,
            self.start,
            tuple(m.detach() for m in self.members),
        )

    def _flat(self, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {f"{prefix}{n}": x.contiguous() for n, x in self.tensors.items()}
        notes = {f"{prefix}notes": json.dumps([self.length, self.start, len(self.members)])}
        for n, m in enumerate(self.members):
            more, others = m._flat(f"{prefix}{n}.")
            tensors |= more
            notes |= others
        return tensors, notes

    def save(self, path: str | Path) -> None:
        """Write the state as a safetensors file."""
        from safetensors.torch import save_file

        tensors, notes = self._flat()
        save_file({n: x.clone() for n, x in tensors.items()}, str(path), metadata=notes)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> State:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(str(path), framework="pt", device=device) as file:
            notes, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118

        def build(prefix: str) -> State:
            length, start, count = json.loads(notes[f"{prefix}notes"])
            own = {
                n.removeprefix(prefix): x
                for n, x in tensors.items()
                if n.startswith(prefix) and "." not in n.removeprefix(prefix)
            }
            return cls(own, length, start, tuple(build(f"{prefix}{n}.") for n in range(count)))

        return build("")
