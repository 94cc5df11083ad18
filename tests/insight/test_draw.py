"""Pictures against masks and biases that are known."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import saccade as sc
from saccade.insight.draw import weights
from saccade.parts.logits import alibi_slopes


def test_a_mask_is_drawn_pair_by_pair() -> None:
    shades = sc.draw("causal + window(2) + sink(1)", 5).shaded()
    assert shades == [
        [4, 0, 0, 0, 0],
        [4, 4, 0, 0, 0],
        [4, 4, 4, 0, 0],
        [4, 0, 4, 4, 0],
        [4, 0, 0, 4, 4],
    ]


def test_a_bias_fades_as_it_should() -> None:
    for head, slope in enumerate(alibi_slopes(4)):
        last = sc.draw("causal + alibi", 12, head=head).weights[-1]
        assert last == pytest.approx([math.exp(-slope * (11 - j)) for j in range(12)])


def test_content_is_drawn_where_it_decides() -> None:
    chosen = sc.draw("moba(block=4, top=1)", 16).weights
    assert all(sum(w > 0 for w in row) <= 8 for row in chosen)
    assert len({tuple(w > 0 for w in row[:12]) for row in chosen[12:]}) > 1
    flat = sc.draw("full", 6).weights
    assert flat == ((1.0,) * 6,) * 6
    assert sc.draw("full", 6, content=True).weights != flat


def test_a_mechanism_without_weights_is_drawn_through_its_values() -> None:
    found = weights(sc.mechanism("linformer(4, length=8)"), 6, content=True)
    assert found.shape == (4, 6, 6)
    assert bool((found.abs() > 0).all())
    with pytest.raises(sc.NotSupported, match="at most 8 tokens"):
        sc.draw("linformer(4, length=8)", 9)


def test_svg_is_well_formed_and_holds_every_cell() -> None:
    picture = sc.draw("window(3)", 8)
    root = ElementTree.fromstring(sc.insight.Picture("a < b & c", picture.weights).svg())
    assert root.get("viewBox") == "0 0 8 8"
    title = root.find("{*}title")
    assert title is not None
    assert title.text == "a < b & c"
    cells = "".join(p.get("d") or "" for p in root.iter("{http://www.w3.org/2000/svg}path")).count("M")
    assert cells == sum(w > 0 for row in picture.weights for w in row) == 3 * 8 - 3
    assert picture._repr_svg_() == picture.svg()


def test_saving(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = sc.draw("causal", 3)
    assert picture.save(tmp_path / "p.svg").read_text(encoding="utf-8") == picture.svg()
    with image.open(picture.save(tmp_path / "p.png", cell=2)) as png:
        assert png.size == (6, 6)
        pixels = torch.from_numpy(np.array(png))
    lower = torch.ones(3, 3, dtype=torch.bool).tril().repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(pixels == 0, lower)
    assert torch.equal(pixels == 255, ~lower)
    with pytest.raises(ValueError, match=r"saved as \.svg or \.png, got 'p\.gif'"):
        picture.save(tmp_path / "p.gif")


def test_a_png_without_pillow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install saccade\[draw\]"):
        sc.draw("causal", 3).save(tmp_path / "p.png")


def test_blocks_for_a_terminal() -> None:
    assert str(sc.draw("causal", 2)) == "\u2588\u2588\n\u2588\u2588\u2588\u2588"


@pytest.mark.parametrize(
    ("length", "head", "said"),
    [(0, 0, "1 to 1,024 tokens, got 0"), (2000, 0, "got 2000"), (4, 4, "0 to 3, got 4")],
)
def test_what_cannot_be_drawn(length: int, head: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sc.draw("causal", length, head=head)
