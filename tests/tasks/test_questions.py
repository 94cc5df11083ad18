"""Questions about a text: what is asked for stands in the context, once, where it is said to."""

from __future__ import annotations

import re

import pytest

from saccade.tasks import questions

TEXT = b"".join(b"line %d of a plain text\n" % n for n in range(400))

MADE = [
    questions.needle(TEXT, 2000, 3, needles=3, turns=4),
    questions.needle(TEXT, 400, 4, depth=0.5),
    questions.recall(1000, 5, turns=3),
    questions.recall(600, 5, turns=2, pairs=7),
    questions.variables(TEXT, 1500, 6, chains=3, hops=2, turns=2),
    questions.copy(900, 7),
    questions.copy(900, 7, size=3),
]


@pytest.mark.parametrize("made", MADE, ids=lambda m: m.kind)
def test_answers_stand_where_they_are_said_to(made: questions.Asked) -> None:
    text = made.text()
    assert len(text) == len(made)
    assert [text[a:b] for a, b in made.answers()] == [t.answer for t in made.turns]
    assert all(t.question.startswith(b"Question: ") and t.question.endswith(b"Answer: ") for t in made.turns)


@pytest.mark.parametrize("length", [400, 777, 2000])
def test_lengths_are_kept(length: int) -> None:
    for seed in range(20):
        assert len(questions.needle(TEXT, length, seed)) == length
        assert len(questions.variables(TEXT, length, seed)) == length
        assert length - 14 < len(questions.recall(length, seed)) <= length
        assert length - 14 < len(questions.copy(length, seed)) <= length


def test_needles_are_answered_by_the_context() -> None:
    made = questions.needle(TEXT, 3000, 1, needles=4, turns=8)
    facts = dict(re.findall(rb"\nThe code of (\w+) is (\d+)\.\n", made.context))
    assert len(facts) == 4
    for turn in made.turns:
        (name,) = re.findall(rb"code of (\w+)\?", turn.question)
        assert turn.answer == facts[name] + b"\n"
        at = made.context.index(name)
        assert abs(at / len(made.context) - turn.depth) < 0.06


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_depth_is_obeyed(depth: float) -> None:
    made = questions.needle(TEXT, 4000, 2, depth=depth)
    assert made.turns[0].depth == pytest.approx(depth, abs=1e-3)
    assert abs(made.context.index(b"The code of") / len(made.context) - depth) < 0.02


def test_pairs_are_answered_by_the_context() -> None:
    made = questions.recall(2000, 9, turns=20)
    pairs = dict(re.findall(rb"(\w+): (\d+)\n", made.context))
    for turn in made.turns:
        (name,) = re.findall(rb"What is (\w+)\?", turn.question)
        assert turn.answer == pairs[name] + b"\n"


def test_chains_are_followed_in_order() -> None:
    made = questions.variables(TEXT, 3000, 11, chains=4, hops=3, turns=6)
    values: dict[bytes, bytes] = {}
    for name, value in re.findall(rb"\nlet (\w+) = (\w+)\n", made.context):
        values[name] = value if value.isdigit() else values[value]
    assert len(values) == 16
    for turn in made.turns:
        (name,) = re.findall(rb"What is (\w+)\?", turn.question)
        assert turn.answer == values[name] + b"\n"


def test_copies_repeat_the_line() -> None:
    (turn,) = questions.copy(500, 1).turns
    assert questions.copy(500, 1).context == b"Text: " + turn.answer


def test_seeds_decide() -> None:
    assert questions.needle(TEXT, 900, 1) == questions.needle(TEXT, 900, 1)
    assert questions.needle(TEXT, 900, 1) != questions.needle(TEXT, 900, 2)


def test_metric_counts_whole_answers() -> None:
    turns = questions.recall(1000, 5, turns=4).turns
    right = [t.answer for t in turns]
    assert questions.exact(right, turns) == 1.0
    assert questions.exact([*right[:3], right[3][:-2] + b"x\n"], turns) == 0.75
    with pytest.raises(ValueError, match="as many answers"):
        questions.exact(right[:2], turns)


@pytest.mark.parametrize(
    "call",
    [
        lambda: questions.needle(TEXT, 60, 0),
        lambda: questions.needle(TEXT[:100], 2000, 0),
        lambda: questions.recall(60, 0),
        lambda: questions.recall(500, 0, pairs=200),
        lambda: questions.variables(TEXT, 80, 0),
        lambda: questions.copy(40, 0),
        lambda: questions.copy(400, 0, size=400),
    ],
)
def test_too_little_room_is_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="bytes"):
        call()
