"""Pictures of mechanisms: which keys each query reads, and how much, as SVG, PNG or blocks in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saccade.errors import MechanismError, NotSupported
from saccade.mechanism import Mechanism, Mixer, Pairwise, draw_named
from saccade.mechanism import mechanism as parse
from saccade.parts.base import Sizes
from saccade.plan import Attended, Weights, attend

LONGEST = 1024
SHADES = 4
_HEADS, _CHANNELS = 4, 32
_BLOCKS = " \u2591\u2592\u2593\u2588"


@dataclass(frozen=True)
class Picture:
    """Weights of queries (rows) over keys (columns), each row scaled so that its greatest is 1."""

    title: str
    weights: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, title: str, rows: Iterable[Iterable[float]]) -> Picture:
        """The picture of weights of any sign and scale."""
        sizes = [[abs(w) for w in row] for row in rows]
        return cls(title, tuple(tuple(w / (max(row) or 1.0) for w in row) for row in sizes))

    def shaded(self, shades: int = SHADES) -> list[list[int]]:
        """Shades 0 to `shades`, row by row: any weight above zero is at least 1."""
        return [[math.ceil(shades * w - 1e-9) for w in row] for row in self.weights]

    def paths(self, shades: int = SHADES) -> list[tuple[float, str]]:
        """The opacity and the path, in svg, of all cells of a shade, one cell one unit."""
        found: dict[int, list[str]] = {}
        for y, row in enumerate(self.shaded(shades)):
            for x, level in enumerate(row):
                if level:
                    found.setdefault(level, []).append(f"M{x} {y}h1v1h-1z")
        return [(level / shades, "".join(squares)) for level, squares in sorted(found.items())]

    def __str__(self) -> str:
        """Blocks for a terminal, two characters a cell so that a cell is about square."""
        return "\n".join("".join(2 * _BLOCKS[level] for level in row).rstrip() for row in self.shaded())

    def svg(self) -> str:
        """A drawing of its own, one path a shade, in the colour of the text around it."""
        drawn = "".join(f'<path fill-opacity="{opacity:g}" d="{path}"/>' for opacity, path in self.paths())
        rows, columns = len(self.weights), len(self.weights[0]) if self.weights else 0
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns} {rows}" role="img" '
            f'fill="currentColor" shape-rendering="crispEdges"><title>{_escaped(self.title)}</title>{drawn}</svg>'
        )

    def _repr_svg_(self) -> str:
        return self.svg()

    def save(self, path: str | Path, *, cell: int = 8) -> Path:
        """Write an .svg or, with Pillow, a .png of `cell` pixels a cell; returns the path.

        Raises ValueError for another ending, ImportError where Pillow is needed and absent.
        """
        file = Path(path)
        if file.suffix == ".svg":
            file.write_text(self.svg(), encoding="utf-8")
        elif file.suffix == ".png":
            self._png(file, cell)
        else:
            raise ValueError(f"a picture is saved as .svg or .png, got {file.name!r}")
        return file

    def _png(self, file: Path, cell: int) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError(
                "a .png needs Pillow: pip install saccade[draw], or save an .svg, which needs nothing"
            ) from error
        grey = 255 - torch.tensor(self.shaded()) * 255 // SHADES
        pixels = grey.to(torch.uint8).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        Image.fromarray(pixels.numpy()).save(file)


def draw(
    mechanism: str | Mechanism, length: int = 32, *, head: int = 0, content: bool | None = None
) -> Picture:
    """Which keys the queries of one head of four read, and how much.

    With `content`, queries and keys are random; without, they are zero, so that what remains is position alone: masks,
    biases. Left open, content is drawn where the mechanism chooses pairs by it. Raises NotSupported for a mechanism whose
    weights cannot be drawn, ValueError for a length outside 1 to 1,024 or a head outside 0 to 3.

    >>> print(draw("window(2)", 4).svg()[:39])
    <svg xmlns="http://www.w3.org/2000/svg"
    >>> draw("causal", 3).shaded()
    [[4, 0, 0], [4, 4, 0], [4, 4, 4]]
    """
    m = parse(mechanism)
    if not 1 <= length <= LONGEST:
        raise ValueError(f"a picture shows 1 to {LONGEST:,} tokens, got {length}")
    if not 0 <= head < _HEADS:
        raise ValueError(f"a picture shows one of {_HEADS} heads, 0 to {_HEADS - 1}, got {head}")
    chosen = isinstance(m, Pairwise) and not m.static
    found = weights(m, length, chosen if content is None else content)[head]
    return Picture.of(f"{m}, {length} tokens", found.tolist())


@torch.no_grad()
def weights(m: Mechanism, length: int, content: bool, channels: int = _CHANNELS) -> Tensor:
    """Weights (4, L, L) of four heads over `length` tokens of random, or of no, content.

    Where a mechanism has no weights to ask for, values that are unit vectors turn its output into them.
    """
    generator = torch.Generator().manual_seed(0)
    groups = m.kv_heads(_HEADS)
    q, k = (
        torch.randn(1, h, n, channels, generator=generator) * content
        for h, n in ((_HEADS, 1 if m.learned_query else length), (groups, length))
    )

    def call(value_dim: int, v: Tensor, need: tuple[str | Weights, ...]) -> Attended | Tensor:
        sizes = Sizes(_HEADS, groups, channels, value_dim)
        return attend(q, k, v, m, need=need, **draw_named(m, sizes, 1, length, generator))

    if not isinstance(m, Mixer):
        try:
            found = call(1, torch.zeros(1, groups, length, 1), ("weights",))
            assert isinstance(found, Attended)
            assert found.weights is not None
            return found.weights[0]
        except MechanismError:
            raise
        except NotSupported:
            pass
    out = call(length, torch.eye(length).expand(1, groups, -1, -1), ("out",))
    assert isinstance(out, Tensor)
    return out[0]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
