"""Numbers as integers of a few bits, several to a byte, and rows of keys and values that are stored so.

Legend: R rows, each a head of a sample, N blocks of `block` tokens of all rows, r query heads a row, L queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from saccade.cache.bases import Bases, rotated
from saccade.cache.segments import Partial
from saccade.parts.normalizer import merge
from saccade.plan import attend

SLAB = 1 << 14
"""Tokens, of all rows together, that are unpacked at a time."""


@dataclass(frozen=True)
class Packed:
    """Numbers (..., m g) in groups of g: x = zero + code scale, 8 / bits codes a byte, one scale and one zero a group.

    codes (..., m, g bits / 8) of uint8; scale and zero (..., m) in bfloat16. A number takes bits + 32 / g bits.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def of(cls, x: Tensor, bits: int, group: int) -> Packed:
        """Pack x (..., m g). Zero is rounded down and scale up, so no number is further than scale / 2 from its own."""
        if bits not in (2, 4, 8):
            raise ValueError(f"bits is 2, 4 or 8, got {bits}")
        if group < 1 or group * bits % 8 or x.shape[-1] % group:
            raise ValueError(
                f"groups of {group} numbers of {bits} bits must fill whole bytes and divide the last axis, {x.shape[-1]}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = x.to(wide).unflatten(-1, (-1, group))
        most = (1 << bits) - 1
        zero = _rounded(parts.amin(-1), up=False)
        scale = _rounded((parts.amax(-1) - zero.to(wide)) / most, up=True)
        step = scale.to(wide).masked_fill(scale == 0, 1.0).unsqueeze(-1)
        codes = ((parts - zero.to(wide).unsqueeze(-1)) / step).round().clamp(0, most).to(torch.uint8)
        return cls(pack(codes, bits), scale, zero, bits)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scale, self.zero))

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """What was packed (..., m g), each within scale / 2."""
        wide = torch.promote_types(dtype, torch.float32)
        scale, zero = (x.to(wide).unsqueeze(-1) for x in (self.scale, self.zero))
        return unpack(self.codes, self.bits).to(wide).mul_(scale).add_(zero).flatten(-2).to(dtype)

    def __getitem__(self, index: Tensor) -> Packed:
        return Packed(self.codes[index], self.scale[index], self.zero[index], self.bits)

    def woven(self, own: Tensor, other: Packed, others: Tensor) -> Packed:
        """Both along the first axis, this at the places `own` and the other at `others`."""
        pairs = ((self.codes, other.codes), (self.scale, other.scale), (self.zero, other.zero))
        codes, scale, zero = (_woven(a, own, b, others) for a, b in pairs)
        return Packed(codes, scale, zero, self.bits)


def _woven(a: Tensor, own: Tensor, b: Tensor, others: Tensor) -> Tensor:
    made = a.new_empty(len(a) + len(b), *a.shape[1:])
    made[own], made[others] = a, b
    return made


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits (..., n) of uint8, to bytes (..., n bits / 8); the first is in the lowest bits."""
    parts = codes.unflatten(-1, (-1, 8 // bits))
    made = torch.zeros_like(parts[..., 0])
    for n in range(8 // bits):
        made |= parts[..., n] << (n * bits)
    return made


def unpack(data: Tensor, bits: int) -> Tensor:
    """What `pack` packed: bytes (..., n) to integers (..., 8 n / bits) of uint8."""
    most = (1 << bits) - 1
    return torch.stack([(data >> (n * bits)) & most for n in range(8 // bits)], -1).flatten(-2)


def fitting(width: int, group: int, bits: int) -> int:
    """The largest group of at most `group` numbers that divides `width` and fills whole bytes.

    Raises ValueError where there is none.
    """
    found = [n for n in range(1, min(group, width) + 1) if width % n == 0 and n * bits % 8 == 0]
    if not found:
        raise ValueError(
            f"{width} numbers of {bits} bits a token fill no whole bytes; use more bits, or a head size that is a multiple "
            f"of {8 // bits}"
        )
    return found[-1]


@dataclass(frozen=True)
class PackedSegments:
    """Row after row of packed keys and values, in blocks of tokens; each row has a number of blocks of its own.

    keys (N, d, block) where each group is one channel of some tokens (`by_channel`), else (N, block, d) where each group is
    some channels of one token; values (N, block, e). `positions` (N, block), or (R,) the first of each row where the
    positions of every row follow one another; -1 where a key was dropped later. Keys and values are in `bases`, and leave
    them as they are read.
    """

    keys: Packed
    values: Packed
    positions: Tensor
    blocks: tuple[int, ...]
    block: int
    by_channel: bool
    dtype: torch.dtype
    bases: Bases | None = None

    @classmethod
    def of(
        cls, k: Tensor, v: Tensor, positions: Tensor, keep: Tensor, *, bits: int, group: int, block: int,
        by_channel: bool, bases: Bases | None = None,
    ) -> PackedSegments:  # fmt: skip
        """Pack the keys of k (b, g, n, d), v (b, g, n, e), positions (b, g, n) where `keep` (b, g, n); blocks must be whole."""
        counts = keep.flatten(0, 1).sum(-1).tolist()
        if any(n % block for n in counts):
            raise ValueError(f"each row packs whole blocks of {block} keys, got {counts}")
        dtype = k.dtype
        if bases is not None:
            k, v = bases.stored(k, v)
        keys, values = k[keep].unflatten(0, (-1, block)), v[keep].unflatten(0, (-1, block))
        if by_channel:
            packed = Packed.of(keys.transpose(1, 2), bits, block)
        else:
            packed = Packed.of(keys, bits, fitting(k.shape[-1], group, bits))
        blocks = tuple(n // block for n in counts)
        return cls(
            packed,
            Packed.of(values, bits, fitting(v.shape[-1], group, bits)),
            _short(positions[keep].unflatten(0, (-1, block)), blocks, block),
            blocks,
            block,
            by_channel,
            dtype,
            bases,
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Keys of each row."""
        if self.positions.dim() == 1:
            return tuple(n * self.block for n in self.blocks)
        alive = (self.positions >= 0).sum(1).split(list(self.blocks))
        return tuple(int(x.sum()) for x in alive)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, positions and bases."""
        own = self.positions.numel() * self.positions.element_size()
        return self.keys.nbytes + self.values.nbytes + own + (0 if self.bases is None else self.bases.nbytes)

    @property
    def starts(self) -> list[int]:
        """The block with which each row begins."""
        return [0, *accumulate(self.blocks)][:-1]

    def places(self) -> Tensor:
        """The position of each key in its text, (N, block)."""
        if self.positions.dim() == 2:
            return self.positions
        device = self.positions.device
        sizes, starts = (torch.tensor(x, device=device) for x in (self.blocks, self.starts))
        offset = (self.positions - starts * self.block).repeat_interleave(sizes)
        flat = torch.arange(sum(self.blocks), device=device) * self.block + offset
        return flat.to(torch.int32)[:, None] + torch.arange(self.block, device=device, dtype=torch.int32)

    def unpacked(self, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys (rows, n, d) and values (rows, n, e) of blocks `index` (rows, n / block), in the basis they are stored in."""
        k = self.keys[index].numbers(dtype)
        if self.by_channel:
            k = k.transpose(-1, -2)
        return k.flatten(1, 2), self.values[index].numbers(dtype).flatten(1, 2)

    def _slots(self) -> tuple[Tensor, Tensor]:
        """The blocks of each row, (R, blocks of the longest), and which of them it has."""
        at = torch.arange(max(self.blocks, default=0), device=self.positions.device)
        has = at < torch.tensor(self.blocks, device=at.device)[:, None]
        index = torch.tensor(self.starts, device=at.device)[:, None] + torch.where(has, at, 0)
        return index.clamp(max=max(0, sum(self.blocks) - 1)), has

    def spots(self) -> tuple[Tensor, Tensor]:
        """Positions (R, n) and which are keys (R, n), as `padded` gives them."""
        index, has = self._slots()
        positions = self.places()[index].flatten(1).long()
        return positions, has.repeat_interleave(self.block, 1) & (positions >= 0)

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k (R, n, d), v (R, n, e), positions (R, n) and which are keys (R, n), for the longest row's n: all unpacked."""
        k, v = self.unpacked(self._slots()[0], self.dtype)
        if self.bases is not None:
            k, v = rotated(k, self.bases.k.mT).to(self.dtype), rotated(v, self.bases.v.mT).to(self.dtype)
        return k, v, *self.spots()

    def thinned(self, keep: Tensor) -> tuple[PackedSegments, Tensor]:
        """Without the keys that `keep` (R, n) drops, and which are still packed (R, n).

        A block with less than half of its keys left is given up: those have to be packed anew, with others.
        """
        index, has = self._slots()
        alive = keep.unflatten(1, (-1, self.block))
        stays = has & (alive.sum(-1) * 2 >= self.block)
        blocks = tuple(stays.sum(1).tolist())
        kept = index[stays]
        places = self.places()[kept].masked_fill(~alive[stays], -1)
        return self._of(self.keys[kept], self.values[kept], places, blocks), (
            alive & stays[..., None]
        ).flatten(1)

    def select(self, rows: Sequence[int]) -> PackedSegments:
        """These rows, in this order; whole samples."""
        device, starts = self.positions.device, self.starts
        index = torch.cat(
            [torch.arange(starts[n], starts[n] + self.blocks[n], device=device) for n in rows]
            or [torch.zeros(0, dtype=torch.long, device=device)]
        )
        return self._of(
            self.keys[index],
            self.values[index],
            self.places()[index],
            tuple(self.blocks[n] for n in rows),
        )

    def joined(self, other: PackedSegments) -> PackedSegments:
        """Each row of this, followed by the same row of the other."""
        device = self.positions.device
        blocks = tuple(n + m for n, m in zip(self.blocks, other.blocks, strict=True))
        first = torch.zeros(sum(blocks), dtype=torch.bool, device=device)
        for start, n in zip(accumulate(blocks, initial=0), self.blocks, strict=False):
            first[start : start + n] = True
        own, others = first.nonzero()[:, 0], (~first).nonzero()[:, 0]
        return self._of(
            self.keys.woven(own, other.keys, others),
            self.values.woven(own, other.values, others),
            _woven(self.places(), own, other.places(), others),
            blocks,
        )

    def _of(self, keys: Packed, values: Packed, places: Tensor, blocks: tuple[int, ...]) -> PackedSegments:
        short = _short(places, blocks, self.block)
        return PackedSegments(
            keys, values, short, blocks, self.block, self.by_channel, self.dtype, self.bases
        )

    def read(self, q: Tensor) -> Partial | None:
        """What queries (b, h, L, d), all of them later than every key, find here; None where there are no keys.

        At most about `SLAB` tokens are unpacked at a time; what the slabs give is merged.
        """
        if not sum(self.blocks):
            return None
        b, h, length, d = q.shape
        rows = len(self.blocks)
        asked = q.reshape(rows, b * h // rows, length, d)
        if self.bases is not None:
            asked = rotated(asked, self.bases.k).to(q.dtype)
        wide = torch.promote_types(q.dtype, torch.float32)
        width = self.values.codes.shape[-2] * self.values.codes.shape[-1] * 8 // self.values.bits
        out = q.new_zeros(*asked.shape[:3], width, dtype=wide)
        lse = q.new_full(asked.shape[:3], -torch.inf, dtype=wide)
        starts = torch.tensor(self.starts, device=q.device)
        gaps = self.positions.dim() == 2 and bool((self.positions < 0).any())
        for count in sorted(set(self.blocks) - {0}):
            members = torch.tensor([n for n, m in enumerate(self.blocks) if m == count], device=q.device)
            step = max(1, SLAB // (self.block * len(members)))
            found: Partial | None = None
            for low in range(0, count, step):
                at = torch.arange(low, min(low + step, count), device=q.device)
                index = starts[members][:, None] + at
                k, v = (x[:, None] for x in self.unpacked(index, q.dtype))
                mask = (self.positions[index] >= 0).flatten(1)[:, None, None] if gaps else None
                made = attend(asked[members], k, v, "full", mask=mask, need=("out", "lse"))
                assert made.lse is not None
                part = made.out.to(wide), made.lse
                found = part if found is None else merge([found, part])
            assert found is not None
            out[members], lse[members] = found[0], found[1].to(wide)
        if self.bases is not None:
            out = rotated(out, self.bases.v.mT)
        return out.to(q.dtype).view(b, h, length, -1), lse.view(b, h, length)


def _short(places: Tensor, blocks: tuple[int, ...], block: int) -> Tensor:
    """Positions (N, block) of each row's keys, or (R,) the first of each row where they follow one another."""
    starts = torch.tensor([0, *accumulate(blocks)][:-1], device=places.device)
    filled = torch.tensor(blocks, device=places.device) > 0
    if not len(places):
        return torch.zeros(len(blocks), dtype=torch.int32, device=places.device)
    first = torch.where(filled, places[starts.clamp(max=len(places) - 1), 0], 0)
    sizes = torch.tensor(blocks, device=places.device) * block
    offset = (first - starts * block).repeat_interleave(sizes)
    flat = places.flatten()
    if torch.equal(flat, (offset + torch.arange(len(flat), device=flat.device)).to(flat.dtype)):
        return first.to(torch.int32)
    return places.to(torch.int32)


def _rounded(x: Tensor, *, up: bool) -> Tensor:
    """x in bfloat16, rounded up or down."""
    y = x.to(torch.bfloat16)
    off = y.to(x.dtype) < x if up else y.to(x.dtype) > x
    return torch.where(off, torch.nextafter(y, torch.full_like(y, torch.inf if up else -torch.inf)), y)
