"""The table of `saccade compare` in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from saccade.bench.summary import WHATS

_HEADS = {"forward": "forward", "backward": "fwd+bwd", "decode": "decode"}
_DASH = "\u2013"

Entry = Mapping[str, Any]


def table(results: Mapping[str, Any]) -> Table:
    """One row a mechanism: bits per byte, recall by length, times and memory at the longest length, where it wins."""
    entries: list[Entry] = results.get("summary") or []
    noise = results.get("noise") or {}
    lengths = results["settings"]["speed_lengths"]
    shown = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    shown.add_column("mechanism", no_wrap=True)
    columns: list[tuple[str, Callable[[Entry], str]]] = [("bits/byte", _bits)]
    columns += [(f"recall\n{n:,}", _recall(str(n))) for n in results["settings"]["recall_lengths"]]
    longest = str(max(lengths))
    columns += [(f"{_HEADS[what]}\nms, {int(longest):,}", _time(what, longest)) for what in WHATS]
    columns += [(f"memory\nMiB, {int(longest):,}", _memory(longest))]
    columns += [("cost\nn^x", _exponent), ("faster\nfrom", _faster)]
    for head, _ in columns:
        shown.add_column(head, justify="right", no_wrap=True)
    for entry in entries:
        shown.add_row(entry["name"], *(cell(entry) for _, cell in columns))
    shown.add_row("noise", *_noise(noise, results["settings"]), style="dim")
    return shown


def _bits(entry: Entry) -> str:
    value = entry["bits_per_byte"]
    return _DASH if value is None else f"{value:.3f}"


def _recall(length: str) -> Callable[[Entry], str]:
    return lambda entry: f"{100 * entry['recall'][length]:.0f}%" if length in entry["recall"] else _DASH


def _time(what: str, length: str) -> Callable[[Entry], str]:
    def cell(entry: Entry) -> str:
        value = entry[f"{what}_ms"].get(length)
        return _DASH if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    return cell


def _memory(length: str) -> Callable[[Entry], str]:
    def cell(entry: Entry) -> str:
        value = entry["peak_bytes"]["backward"].get(length)
        return _DASH if value is None else f"{value / 2**20:.0f}"

    return cell


def _exponent(entry: Entry) -> str:
    return _DASH if entry["exponent"] is None else f"{entry['exponent']:.2f}"


def _faster(entry: Entry) -> str:
    return _DASH if entry["faster_from"] is None else f"{entry['faster_from']:,}"


def _noise(noise: Mapping[str, float | None], settings: Mapping[str, Any]) -> list[str]:
    def share(key: str) -> str:
        value = noise.get(key)
        return _DASH if value is None else f"\u00b1{100 * value:.0f}%"

    bits = noise.get("bits_per_byte")
    return [
        _DASH if bits is None else f"\u00b1{bits:.3f}",
        *(share("recall") for _ in settings["recall_lengths"]),
        *(share(what) for what in WHATS),
    ]
