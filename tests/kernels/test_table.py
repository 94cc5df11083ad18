"""Tables of kept blocks against the pairs themselves: every mask, offset, padding and choice of blocks."""

from __future__ import annotations

import pytest
import torch

import saccade as sc
from saccade.kernels.table import PARTIAL, WHOLE, Place, check_blocks, table_of, table_of_blocks
from saccade.parts.algebra import Pairs, static_exist
from saccade.parts.mask import Causal, Chunk, Window
from saccade.parts.selection import Blocks

MASKS = [
    "full",
    "causal",
    "window(70)",
    "causal + sink(3) + window(50)",
    "strided(7)",
    "document((100, 30))",
    "causal + document((100, 30))",
    "prefix(90)",
    "chunk(50)",
    "causal + chunk(64)",
    "local_blocks(20, last=3)",
    "causal + power_blocks(8)",
    "stripes(16, every=4)",
    "neighborhood(31)",
    "neighborhood(9, dilation=3)",
    "dilated(5, step=9)",
    "global(5)",
    "causal + global(70) + window(9)",
    "permuted(65)",
    "every(7) + window(3)",
]
PLACES = [
    (150, 150, 64, 64, 0, 0, None),
    (70, 200, 128, 64, 130, 0, None),
    (1, 200, 1, 16, 199, 0, None),
    (200, 70, 64, 128, -130, 0, None),
    (150, 150, 64, 64, 0, 0, [150, 90, 0]),
    (70, 200, 128, 64, None, 0, [200, 90, 75]),
    (40, 100, 64, 64, 150, 90, None),
    (64, 64, 64, 64, 0, 0, None),
]


def pairs_of(text: str) -> Pairs:
    return sc.mechanism(text).pairs  # type: ignore[union-attr]


def wanted(pairs: Pairs, place: Place, batch: int) -> torch.Tensor:
    i = place.positions[min(batch, place.positions.shape[0] - 1)].long()[:, None]
    j = torch.arange(place.keys)[None]
    found = static_exist(pairs, i, j + place.start).expand(place.length, place.keys)
    return found if place.ends is None else found & (j < place.ends[batch])


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize(("rows", "keys", "high", "wide", "offset", "start", "ends"), PLACES)
def test_a_table_holds_the_pairs_of_its_mask(
    text: str,
    rows: int,
    keys: int,
    high: int,
    wide: int,
    offset: int | None,
    start: int,
    ends: list[int] | None,
) -> None:
    place = Place(rows, keys, offset, start, None if ends is None else torch.tensor(ends))
    table = table_of(pairs_of(text), place, high, wide)
    for b in range(1 if ends is None else 3):
        assert torch.equal(table.exist(b), wanted(pairs_of(text), place, b))


@pytest.mark.parametrize("text", MASKS)
def test_lists_name_every_kept_block_once_whole_ones_first_either_way_round(text: str) -> None:
    table = table_of(pairs_of(text), Place(300, 500, 200), 64, 64)
    for found, state in ((table.by_query, table.state), (table.by_key, table.state.transpose(-1, -2))):
        assert found.index.is_contiguous()
        for n in range(state.shape[2]):
            full, count = int(found.full[0, 0, n]), int(found.count[0, 0, n])
            listed = found.index[0, 0, n, :count].tolist()
            assert listed[:full] == (state[0, 0, n] == WHOLE).nonzero().flatten().tolist()
            assert listed[full:] == (state[0, 0, n] == PARTIAL).nonzero().flatten().tolist()


def test_most_blocks_of_a_long_window_are_whole_and_a_far_one_is_not_kept() -> None:
    table = table_of(Causal() & Window(1024), Place(4096, 4096), 128, 128)
    assert table.bits is None
    assert table.by_query.count.max() == 9
    assert (table.by_query.full[0, 0, 9:] == 7).all()


def test_bits_of_masks_by_distance_are_drawn_once_a_diagonal() -> None:
    table = table_of(pairs_of("strided(7)"), Place(4096, 4096), 128, 128)
    assert table.bits is not None
    assert table.bits.shape[0] == 2 * 32 - 1
    assert table.nbytes < 4096 * 4096 // 8


def chosen_pairs(
    chosen: Blocks, place: Place, limit: Pairs, allow: Pairs | None, b: int, h: int
) -> torch.Tensor:
    i, j = torch.arange(place.length), torch.arange(place.keys)
    found = chosen.exist(slice(0, place.length), j, j)[b, h]
    if allow is not None:
        found = found | static_exist(allow, i[:, None], j[None])
    return found & static_exist(limit, i[:, None], j[None])


@pytest.mark.parametrize("allow", [None, Chunk(64), Window(20)])
@pytest.mark.parametrize(("rows", "size"), [(64, 64), (128, 64), (64, 256), (256, 128), (1, 64), (1, 128)])
def test_a_choice_of_blocks_under_a_limit_united_with_a_mask(
    rows: int, size: int, allow: Pairs | None
) -> None:
    length = 300
    g = torch.Generator().manual_seed(0)
    shape = (2, 3, -(-length // rows), 2)
    index = torch.randint(0, -(-length // size), shape, generator=g)
    chosen = Blocks(index, torch.rand(shape, generator=g) < 0.8, size, rows)
    place = Place(length, length)
    table = table_of_blocks(chosen, place, Causal(), allow)
    for b in range(2):
        for h in range(3):
            assert torch.equal(table.exist(b, h), chosen_pairs(chosen, place, Causal(), allow, b, h))


def test_single_rows_stay_single_for_decoding() -> None:
    index = torch.tensor([[[[0, 3, 5]]]])
    chosen = Blocks(index, torch.ones_like(index, dtype=torch.bool), 10)
    table = table_of_blocks(chosen, Place(1, 57, 56), Causal(), Window(12), rows=1)
    kept = torch.tensor([j // 10 in (0, 3, 5) or j > 44 for j in range(57)])
    assert torch.equal(table.exist()[0], kept)


def test_sizes_that_fit_no_table_are_refused() -> None:
    index = torch.zeros(1, 1, 4, 1, dtype=torch.long)
    for rows, size in ((64, 48), (48, 64), (32, 64)):
        with pytest.raises(sc.NotSupported, match="fit no table"):
            table_of_blocks(Blocks(index, index == 0, size, rows), Place(200, 200))
    with pytest.raises(sc.NotSupported, match="blocks of 64 queries share a choice"):
        table_of_blocks(Blocks(index, index == 0, 64, 64), Place(200, 200), rows=1)


def test_bits_have_a_limit() -> None:
    with pytest.raises(sc.NotSupported, match="bytes of bits"):
        table_of(pairs_of("strided(3) + global(1)"), Place(1 << 20, 1 << 20), 1 << 13, 1 << 13)


def test_a_repeated_or_missing_block_is_found() -> None:
    index = torch.tensor([[[[0, 2], [1, 1]]]])
    valid = torch.ones_like(index, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"block 1 was chosen twice at \(0, 0, 1\)|block 1 was chosen twice at \[0, 0, 1\]"
    ):
        check_blocks(Blocks(index, valid, 8), 24)
    with pytest.raises(ValueError, match="2 blocks of 8, 0 to 1"):
        check_blocks(Blocks(index, valid, 8), 16)
    check_blocks(Blocks(index, torch.tensor([[[[True, False], [True, False]]]]), 8), 16)
