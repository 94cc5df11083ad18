"""Questions about a text, as bytes: needles in real text, pairs to recall, chains of variables, strings to repeat.

Every turn reads "Question: ...?\\nAnswer: ...\\n", so that one model answers all kinds and many turns can follow one
context. The metric is the share of answers that are right to the last byte. After Hsieh et al., RULER: What's the Real
Context Size of Your Long-Context Language Models?, 2024.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_ONSETS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
ASK, ANSWER, END = "Question: ", "Answer: ", "\n"


@dataclass(frozen=True)
class Turn:
    """A question, with the lead-in of its answer, and the answer with its line end; `depth` is where in the context it stands (0 to 1)."""

    question: bytes
    answer: bytes
    depth: float


@dataclass(frozen=True)
class Asked:
    """A context and the turns that follow it."""

    context: bytes
    turns: tuple[Turn, ...]
    kind: str

    def __len__(self) -> int:
        return len(self.context) + sum(len(t.question) + len(t.answer) for t in self.turns)

    def text(self) -> bytes:
        """Everything in order, answers included."""
        return self.context + b"".join(t.question + t.answer for t in self.turns)

    def answers(self) -> list[tuple[int, int]]:
        """Where each answer begins and ends in `text()`."""
        spans, at = [], len(self.context)
        for turn in self.turns:
            at += len(turn.question)
            spans.append((at, at + len(turn.answer)))
            at += len(turn.answer)
        return spans


def word(draw: random.Random, syllables: int = 3) -> str:
    """A made-up word: consonant and vowel in turn."""
    return "".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(syllables))


def words(draw: random.Random, count: int, syllables: int = 3) -> list[str]:
    """Made-up words that all differ."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(draw, syllables)] = None
    return list(found)


def number(draw: random.Random, digits: int = 5) -> str:
    return "".join(draw.choice("0123456789") for _ in range(digits))


def turn(what: str, answer: str, depth: float = 0.0) -> Turn:
    return Turn(f"{ASK}{what}{END}{ANSWER}".encode(), f"{answer}{END}".encode(), depth)


def needle(
    text: bytes, length: int, seed: int, needles: int = 1, turns: int = 1, depth: float | None = None
) -> Asked:
    """Facts "The code of `name` is `digits`." between lines of `text`, which is cut so that all is at most `length` bytes.

    The first needle that is asked for stands at the share `depth` of the text, or anywhere. Raises ValueError where
    `length` has no room, or `text` is shorter than what is asked for.
    """
    draw = random.Random(seed)
    names = words(draw, needles)
    codes = {name: number(draw) for name in names}
    asked = [names[n % needles] for n in range(turns)]
    facts = {n: f"\nThe code of {n} is {codes[n]}.\n".encode() for n in names}
    tail = [turn(f"What is the code of {n}?", codes[n]) for n in asked]
    room = length - sum(map(len, facts.values())) - sum(len(t.question) + len(t.answer) for t in tail) - 1
    if room < needles or len(text) < room:
        raise ValueError(
            f"{needles} needles and {turns} turns in {length} bytes need a text of {max(room, needles)} bytes, got {len(text)}"
        )
    places = [draw.random() for _ in names]
    if depth is not None:
        places[0] = depth
    at = {n: round(p * room) for n, p in zip(names, places, strict=True)}
    pieces, last = [], 0
    for name in sorted(names, key=at.__getitem__):
        pieces += [text[last : at[name]], facts[name]]
        last = at[name]
    context = b"".join(pieces) + text[last:room] + b"\n"
    return Asked(
        context,
        tuple(Turn(t.question, t.answer, at[n] / room) for t, n in zip(tail, asked, strict=True)),
        "needle",
    )


def recall(length: int, seed: int, turns: int = 4, pairs: int | None = None) -> Asked:
    """Lines "name: digits" as many as fit into `length` bytes (or `pairs`), and some names asked for."""
    draw = random.Random(seed)
    lead = b"Pairs:\n"
    one, tail = len(b"bababa: 12345\n"), len(b"Question: What is bababa?\nAnswer: 12345\n")
    room = (length - len(lead) - turns * tail) // one
    count = room if pairs is None else pairs
    if not 1 <= count <= room:
        raise ValueError(f"{length} bytes with {turns} turns hold 1 to {room} pairs, got {count}")
    names = words(draw, count)
    codes = {name: number(draw) for name in names}
    asked = [draw.randrange(count) for _ in range(turns)]
    return Asked(
        lead + "".join(f"{n}: {codes[n]}\n" for n in names).encode(),
        tuple(turn(f"What is {names[i]}?", codes[names[i]], i / count) for i in asked),
        "recall",
    )


def variables(text: bytes, length: int, seed: int, chains: int = 3, hops: int = 2, turns: int = 1) -> Asked:
    """Chains "let a = 12345", "let b = a", ... scattered over lines of `text` in order; the value of the last names is asked for."""
    draw = random.Random(seed)
    names = words(draw, chains * (hops + 1), 2)
    values = [number(draw) for _ in range(chains)]
    lines, ends = [], []
    for c in range(chains):
        chain = names[c * (hops + 1) : (c + 1) * (hops + 1)]
        lines.append(
            [f"\nlet {chain[0]} = {values[c]}\n"] + [f"\nlet {b} = {a}\n" for a, b in pairwise(chain)]
        )
        ends.append(chain[-1])
    order = [c for c in range(chains) for _ in range(hops + 1)]
    draw.shuffle(order)
    rows = [lines[c].pop(0).encode() for c in order]
    asked = [draw.randrange(chains) for _ in range(turns)]
    tail = tuple(turn(f"What is {ends[c]}?", values[c]) for c in asked)
    room = length - sum(map(len, rows)) - sum(len(t.question) + len(t.answer) for t in tail) - 1
    if room < 1 or len(text) < room:
        raise ValueError(
            f"{chains} chains of {hops} hops in {length} bytes need a text of {max(room, 1)} bytes, got {len(text)}"
        )
    cuts = sorted(draw.randrange(room + 1) for _ in rows)
    pieces, last = [], 0
    for cut, row in zip(cuts, rows, strict=True):
        pieces += [text[last:cut], row]
        last = cut
    return Asked(b"".join(pieces) + text[last:room] + b"\n", tail, "variables")


def copy(length: int, seed: int, size: int | None = None) -> Asked:
    """A line of made-up words that is to be repeated; `size` words, or as many as `length` holds."""
    draw = random.Random(seed)
    lead, ask = "Text: ", "Repeat the text."
    fixed = len(lead) + len(END) + len(ASK) + len(ask) + len(END) + len(ANSWER) + len(END)
    room = (length - fixed) // 14
    count = room if size is None else size
    if not 1 <= count <= room:
        raise ValueError(f"{length} bytes hold 1 to {room} words twice, got {count}")
    line = " ".join(word(draw) for _ in range(count))
    return Asked(f"{lead}{line}{END}".encode(), (turn(ask, line),), "copy")


def exact(answers: Sequence[bytes], asked: Sequence[Turn]) -> float:
    """The share of answers that are right to the last byte."""
    if len(answers) != len(asked) or not asked:
        raise ValueError(f"as many answers as turns, at least one: got {len(answers)} and {len(asked)}")
    return sum(a == t.answer for a, t in zip(answers, asked)) / len(asked)
