"""The corpus: what is held out is never trained on, and files that are no text are refused in words."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch

from saccade.tasks import text


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A text in which every 8 bytes are unlike any other 8."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{n:07d} " for n in range(4000)))
    return path


def test_bundled_text_is_english_of_known_size() -> None:
    corpus = text.load(window=256)
    assert corpus.name == "pydoc_data.topics"
    size = sum(map(len, (*corpus.train, *corpus.heldout)))
    assert size > 300_000
    assert 0.09 < sum(map(len, corpus.heldout)) / size < 0.12
    assert b"statement" in corpus.train[0].numpy().tobytes()


def test_parts_join_to_the_whole_text(numbered: Path) -> None:
    corpus = text.load(numbered, window=64)
    blocks = [b for pair in zip(corpus.train, corpus.heldout, strict=True) for b in pair]
    data = torch.cat(blocks).numpy().tobytes()
    assert data == numbered.read_bytes()
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()


def test_heldout_is_spread_over_the_text(numbered: Path) -> None:
    corpus = text.load(numbered, window=64)
    assert len(corpus.heldout) == 10
    firsts = [int(bytes(block.numpy().tobytes()[8:16]).split()[0]) for block in corpus.heldout]
    assert firsts == sorted(firsts)
    assert firsts[0] < 400
    assert firsts[-1] > 3500


def test_no_training_window_holds_a_heldout_byte(numbered: Path) -> None:
    corpus = text.load(numbered, window=64)
    held = {tuple(w.tolist()) for block in corpus.heldout for w in block.unfold(0, 8, 1)}
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        for row in corpus.batch(16, 64, generator):
            assert held.isdisjoint(tuple(w.tolist()) for w in row.unfold(0, 8, 1))


def test_batches_are_windows_of_the_text_and_repeat_with_the_seed(numbered: Path) -> None:
    corpus, data = text.load(numbered, window=64), numbered.read_bytes()
    one = corpus.batch(8, 64, torch.Generator().manual_seed(3))
    assert one.shape == (8, 65)
    assert all(bytes(row.tolist()) in data for row in one)
    assert torch.equal(one, corpus.batch(8, 64, torch.Generator().manual_seed(3)))
    assert not torch.equal(one, corpus.batch(8, 64, torch.Generator().manual_seed(4)))


def test_every_training_position_can_be_drawn() -> None:
    train = (torch.arange(5, dtype=torch.uint8), torch.arange(10, 14, dtype=torch.uint8), torch.zeros(2))
    corpus = text.Corpus(train, train, "", "")
    rows = corpus.batch(400, 2, torch.Generator().manual_seed(0))
    starts = {0, 1, 2, 10, 11}
    assert {tuple(row.tolist()) for row in rows} == {(s, s + 1, s + 2) for s in starts}


def test_heldout_windows_score_every_byte_once() -> None:
    held = (torch.arange(11, dtype=torch.uint8), torch.arange(50, 55, dtype=torch.uint8))
    corpus = text.Corpus(held, held, "", "")
    targets = corpus.windows(4)[:, 1:].flatten().tolist()
    assert targets == [1, 2, 3, 4, 5, 6, 7, 8, 51, 52, 53, 54]


def test_baseline_is_the_cross_entropy_of_byte_frequencies() -> None:
    train = torch.tensor([0] * 300 + [1] * 100, dtype=torch.uint8)
    held = torch.tensor([9, 0, 0, 1, 2], dtype=torch.uint8)
    total = 400 + 256
    expected = -(2 * math.log2(301 / total) + math.log2(101 / total) + math.log2(1 / total)) / 4
    assert text.Corpus((train,), (held,), "", "").baseline(4) == pytest.approx(expected)


@pytest.mark.parametrize("size", [130, 131, 1000, 12_345])
def test_any_text_long_enough_has_both_parts(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"abcdefghij" * size)
    path.write_bytes(path.read_bytes()[:size])
    corpus = text.load(path, window=64)
    assert corpus.windows(64).shape[0] >= 1
    assert corpus.batch(2, 64, torch.Generator().manual_seed(0)).shape == (2, 65)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"too short", "9 bytes.*at least 130"),
        (b"a" * 129, "129 bytes.*at least 130"),
        (b"text " * 100 + b"\0\1", "binary.*offset 500"),
        (b"caf\xc3\xa9 " * 100 + b"caf\xe9 noir", "0xe9 at offset 603"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name}.*{says}"):
        text.load(path, window=64)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        text.load(tmp_path / "none.txt", window=64)
    with pytest.raises(IsADirectoryError):
        text.load(tmp_path, window=64)


def test_utf8_beyond_ascii_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "greek.txt"
    path.write_text("\u03bb\u03cc\u03b3\u03bf\u03c2 " * 60, encoding="utf-8")
    corpus = text.load(path, window=64)
    assert sum(map(len, (*corpus.train, *corpus.heldout))) == len(path.read_bytes())
