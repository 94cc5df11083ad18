"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup, escape

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
DASH = "\u2013"
WHATS = {"forward": "Forward", "backward": "Forward + backward", "decode": "One-token decode"}


def significant(value: float, digits: int = 3) -> str:
    value = float(f"{value:.{digits}g}")
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def ms_text(value: float) -> str:
    return f"{significant(value)} ms" if value < 999.5 else f"{significant(value / 1000)} s"


def bytes_text(value: float) -> str:
    power = min(int(math.log(max(value, 1), 1024)), len(UNITS) - 1)
    return f"{significant(value / 1024**power)} {UNITS[power]}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def lengths_text(values: Iterable[int]) -> str:
    return ", ".join(f"{n:,}" for n in values)


def breakable(name: str) -> Markup:
    """A name that may break after an underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))
