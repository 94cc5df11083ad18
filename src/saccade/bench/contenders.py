"""The mechanisms of a comparison: parsed, made causal, described and drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import saccade as sc
from saccade.bench.presets import CANDIDATES, REFERENCE, TWIN, Speed
from saccade.insight.draw import weights

_CELLS = 32  # the picture is this many rows and columns
_TOKENS = 512  # of so many queries and keys
_CHANNELS = 64


@dataclass(frozen=True)
class Contender:
    """A mechanism of the comparison; `trained` is its causal form, or None where it has none and `reason` says why."""

    name: str
    asked: str
    role: str
    mechanism: sc.Mechanism
    trained: sc.Mechanism | None
    reason: str

    @property
    def measured(self) -> sc.Mechanism:
        """What is timed: the causal form where there is one."""
        return self.trained or self.mechanism

    @property
    def note(self) -> str:
        """How what runs differs from what was asked."""
        if self.trained is None:
            return "no causal form: timed as a bidirectional mechanism"
        return "" if self.mechanism.causal else "made causal"


def gather(texts: Sequence[str], speed: Speed) -> list[Contender]:
    """The reference, its twin, then the mechanisms asked for (the default set for none), each once.

    Raises MechanismError for a text that names no mechanism.
    """
    asked = [text.strip() for text in texts] or [_sized(text, speed) for text in CANDIDATES]
    found = [_contender(REFERENCE, "reference"), _contender(TWIN, "twin")]
    for text in asked:
        new = _contender(text, "candidate")
        if all(new.measured != old.measured for old in found):
            found.append(new)
    return found


def describe(contender: Contender, speed: Speed, device: str) -> dict[str, Any]:
    """The entry of `results.json`; what cannot be known of a mechanism is None."""
    m = contender.measured
    return {
        "name": contender.name,
        "text": str(m),
        "title": _title(contender),
        "role": contender.role,
        "asked": contender.asked,
        "state_note": _state_note(m),
        "cost": _growth(m, speed, device),
        "trains_on": _kernel(m, speed, device),
        "pattern": pattern(m),
        "pattern_kind": "pairs",
        "note": contender.note or None,
    }


def _contender(text: str, role: str) -> Contender:
    m = sc.mechanism(text)
    try:
        return Contender(text, text, role, m, sc.causal(m), "")
    except sc.NotSupported as error:
        return Contender(text, text, role, m, None, str(error))


def _sized(text: str, speed: Speed) -> str:
    """linformer is made for one greatest length."""
    return f"{text}(length={max(speed.lengths)})" if text == "linformer" else text


def _title(contender: Contender) -> str | None:
    if contender.role == "reference":
        return "full attention"
    if contender.role == "twin":
        return "full attention by another kernel"
    return None


def _growth(m: sc.Mechanism, speed: Speed, device: str) -> str | None:
    """How planned FLOPs grow between two lengths, as O(n^x)."""
    try:
        few, many = (
            sc.plan(m, (speed.batch, speed.heads, n, speed.head_dim), device=device).cost.flops
            for n in (max(speed.lengths), 2 * max(speed.lengths))
        )
    except ValueError:
        return None
    power = round(math.log2(many / few), 1) if few and many else 0.0
    return "O(n)" if power == 1 else f"O(n^{power:g})"


def _kernel(m: sc.Mechanism, speed: Speed, device: str) -> str | None:
    shape = (speed.batch, speed.heads, max(speed.lengths), speed.head_dim)
    try:
        return sc.plan(m, shape, device=device, grad=True).kernel
    except ValueError:
        return None


def _state_note(m: sc.Mechanism) -> str | None:
    """What decoding keeps: a cache of all keys, of the latest ones, or a state of fixed size."""
    if not m.causal:
        return None
    if isinstance(m, sc.Recurrent):
        return "state of fixed size"
    if isinstance(m, sc.Pairwise):
        horizon = m.pairs.horizon
        return "caches all keys" if horizon is None else f"caches the latest {horizon:,} keys"
    return None


def pattern(m: sc.Mechanism) -> list[list[int]] | None:
    """Which keys each query reads, for random inputs: 32 of 512 queries by 32 stretches of 16 keys."""
    try:
        found = weights(m, _TOKENS, content=True, channels=_CHANNELS)
    except (ValueError, TypeError):
        return None
    side = _TOKENS // _CELLS
    read = (found[0, side - 1 :: side].abs() > 1e-6).view(_CELLS, _CELLS, side).any(2)
    return read.int().tolist()
