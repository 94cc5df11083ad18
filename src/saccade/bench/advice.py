"""Says in words what a comparison found: a verdict a mechanism, which to use, and what not to conclude."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saccade.bench.summary import WHATS

LEARNED = 0.9  # recall that counts as learned

Entry = Mapping[str, Any]
_WORDS = {"forward": "forward", "backward": "forward and backward", "decode": "one-token decode"}


class Judge:
    """Compares the entries of a summary with that of the reference."""

    def __init__(
        self, summary: Sequence[Entry], roles: Mapping[str, str], noise: Mapping[str, float | None]
    ) -> None:
        self.reference = next(e for e in summary if roles[e["name"]] == "reference")
        self.candidates = [e for e in summary if roles[e["name"]] == "candidate"]
        self.twins = [e for e in summary if roles[e["name"]] == "twin"]
        self.noise = noise

    def worse_by(self, entry: Entry) -> float | None:
        """Bits per byte above the reference; None when either is unknown."""
        mine, base = entry["bits_per_byte"], self.reference["bits_per_byte"]
        return None if mine is None or base is None else mine - base

    def keeps_quality(self, entry: Entry) -> bool:
        """True when the reference is not better by more than the noise."""
        worse = self.worse_by(entry)
        return worse is not None and worse <= (self.noise["bits_per_byte"] or 0)

    def asked(self) -> list[str]:
        """Lengths at which the reference itself learned to recall; elsewhere recall says nothing."""
        return [n for n, accuracy in self.reference["recall"].items() if accuracy > LEARNED]

    def forgets(self, entry: Entry) -> list[str]:
        """Lengths at which the reference recalls more, beyond the noise."""
        margin = self.noise["recall"] or 0
        base, mine = self.reference["recall"], entry["recall"]
        return [n for n in self.asked() if n in mine and mine[n] < base[n] - margin]

    def times_faster(self, entry: Entry, what: str) -> tuple[float, str] | None:
        """The reference's time over this one's, and the longest length that both have."""
        mine, base = entry[f"{what}_ms"], self.reference[f"{what}_ms"]
        common = mine.keys() & base.keys()
        if not common:
            return None
        longest = max(common, key=int)
        return base[longest] / mine[longest], longest

    def verdict(self, entry: Entry) -> str:
        """A short phrase."""
        if entry["status"] == "failed":
            return "not measured"
        if entry is self.reference:
            return "the reference"
        words = [self._quality(entry), self._recall(entry), self._speed(entry)]
        return ", ".join(w for w in words if w) or "nothing to compare yet"

    def _quality(self, entry: Entry) -> str:
        worse = self.worse_by(entry)
        if worse is None:
            return "quality unknown"
        if entry["quality_tie"]:
            return "quality tie"
        return f"{abs(worse):.2f} bits {'worse' if worse > 0 else 'better'}"

    def _recall(self, entry: Entry) -> str:
        if not entry["recall"] or not self.asked():
            return ""
        lost = self.forgets(entry)
        return f"loses recall at {listing(_number(n) for n in lost)}" if lost else "recalls"

    def _speed(self, entry: Entry) -> str:
        found = self.times_faster(entry, "forward")
        if not found:
            return ""
        ratio, length = found
        if abs(ratio - 1) <= (self.noise["forward"] or 0):
            return f"same speed at {_number(length)}"
        return f"{_ratio(ratio)} at {_number(length)}"

    def advice(self) -> list[str]:
        """Which to use, the plainest first."""
        if not any(e["bits_per_byte"] is not None or e["forward_ms"] for e in self.candidates):
            return []
        return [s for s in (self._use(), *self._if_nearby(), self._best_bits(), self._decoding()) if s]

    def _use(self) -> str:
        name, said = self.reference["name"], "bits per byte"
        equals = [e for e in self.candidates if self.keeps_quality(e)]
        if self.asked():
            said = "bits per byte and recall"
            equals = [e for e in equals if set(self.asked()) <= e["recall"].keys() and not self.forgets(e)]
        faster = [e for e in equals if e["faster_from"] is not None]
        if self.reference["bits_per_byte"] is None:
            return "Quality was not measured for the reference, so this run says which is fast, not which to use."
        if faster:
            best = max(faster, key=lambda e: (self.times_faster(e, "forward") or (0, ""))[0])
            ratio, length = self.times_faster(best, "forward") or (1.0, "")
            return (
                f"Use {best['name']} from {_number(best['faster_from'])} tokens on, and {name} below: in this run it "
                f"keeps the {said} of {name} and its forward pass is {_ratio(ratio)} at {_number(length)} tokens."
            )
        if equals:
            names = listing(e["name"] for e in equals)
            faster_none = "it is not faster" if len(equals) == 1 else "none of them is faster"
            return (
                f"Use {name}: {names} kept its {said} in this run, but {faster_none} at the lengths measured."
            )
        return f"Use {name}: no other mechanism kept its {said} in this run."

    def _if_nearby(self) -> list[str]:
        sentences = []
        for e in self.candidates:
            found = self.times_faster(e, "forward")
            if e["faster_from"] is None or found is None or not self.keeps_quality(e) or not self.forgets(e):
                continue
            lost = listing(_number(n) for n in self.forgets(e))
            sentences.append(
                f"{e['name']} is {_ratio(found[0])} at {_number(found[1])} tokens and ties in bits per byte or better, "
                f"but answers {_percent(e['recall'], self.forgets(e))} of the recall questions at {lost} tokens: use "
                "it where what matters is near."
            )
        return sentences

    def _best_bits(self) -> str:
        known = [e for e in (self.reference, *self.candidates) if e["bits_per_byte"] is not None]
        if len(known) < 2:
            return ""
        best = min(known, key=lambda e: e["bits_per_byte"])
        margin = self.noise["bits_per_byte"] or 0
        level = [
            e["name"] for e in known if e is not best and e["bits_per_byte"] - best["bits_per_byte"] <= margin
        ]
        tied = f"; {listing(level)} {'ties' if len(level) == 1 else 'tie'} with it" if level else ""
        return f"Fewest bits per byte on held-out text: {best['name']}, {best['bits_per_byte']:.2f}{tied}."

    def _decoding(self) -> str:
        ratios = [(f[0], f[1], e) for e in self.candidates if (f := self.times_faster(e, "decode"))]
        if not ratios:
            return ""
        ratio, length, best = max(ratios, key=lambda r: r[0])
        if ratio <= 1 + (self.noise["decode"] or 0):
            return ""
        return f"For decoding after {_number(length)} tokens, {best['name']} takes the least time a token: {_ratio(ratio)}."

    def caveats(self, settings: Mapping[str, Any]) -> list[str]:
        """What this run cannot tell."""
        said = [
            f"What a short run cannot tell: after {settings['tokens']:,} tokens a small model has learned spelling and "
            "little else. Mechanisms that look only nearby learn that faster at first, and what far context is worth "
            "shows after more training."
        ]
        if len(settings["seeds"]) == 1:
            said.append(
                "One seed was trained: another one may move the bits per byte by more than the noise shown."
            )
        if self.reference["recall"] and len(self.asked()) < len(self.reference["recall"]):
            failed = [n for n in self.reference["recall"] if n not in self.asked()]
            said.append(
                f"{self.reference['name']} itself did not learn recall at {listing(_number(n) for n in failed)} tokens "
                "within its budget, so recall there says nothing about the others."
            )
        for twin in self.twins:
            slower = [(_WORDS[w], f) for w in WHATS if (f := self.times_faster(twin, w))]
            if slower:
                ratios = listing(f"{_ratio(f[0])} in {w}" for w, f in slower)
                said.append(
                    f"The same mathematics by another kernel ({twin['name']}) is {ratios} at {_number(slower[0][1][1])} "
                    "tokens: times belong to kernels as much as to mechanisms."
                )
        return said


def listing(words: Iterable[str]) -> str:
    """Words as English lists them."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _ratio(ratio: float) -> str:
    word = "faster" if ratio >= 1 else "slower"
    value = max(ratio, 1 / ratio)
    return f"{value:.0f} times {word}" if value >= 9.5 else f"{value:.1f} times {word}"


def _number(length: str | int) -> str:
    return f"{int(length):,}"


def _percent(recall: Mapping[str, float], lengths: Sequence[str]) -> str:
    return listing(f"{100 * recall[n]:.0f}%" for n in lengths)
