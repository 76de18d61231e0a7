"""What benchmarks report, on tables small enough to count by hand."""

from __future__ import annotations

import pytest

from foveate.evaluate.measures import Scored, measures, scores
from foveate.evaluate.scoring import score


def scored(name: str, *rows: tuple[str, str, str, str]) -> list[Scored]:
    """Answers from (picture, group, prediction, right answer); options are two."""
    return [
        Scored(str(number), image, group, said, right, score(name, said, [right], ("one", "two")))
        for number, (image, group, said, right) in enumerate(rows)
    ]


def test_pope_by_hand() -> None:
    """Of six answers: 2 hits, 1 false yes, 1 missed, 1 true no, 1 that says neither and is counted as wrong."""
    rows = [("a", "yes"), ("b", "yes"), ("c", "no"), ("d", "yes"), ("e", "no"), ("f", "no")]
    said = ["Yes.", "yes, it is", "Yes", "no", "No, none", "maybe"]
    found = measures(
        "pope", scored("pope", *((image, "", one, right) for (image, right), one in zip(rows, said, strict=True)))
    )
    assert found == pytest.approx(
        {"accuracy": 3 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 6, "unclear": 1 / 6}
    )


def test_the_yes_ratio_is_of_what_was_said_not_of_what_is_right() -> None:
    found = measures("pope", scored("pope", ("a", "", "no", "yes"), ("b", "", "no", "yes")))
    assert found["yes_ratio"] == 0 and found["precision"] == found["recall"] == found["f1"] == 0


def test_splits_are_reported_beside_the_whole() -> None:
    rows = [("a", "random", "yes", "yes"), ("b", "popular", "yes", "no"), ("c", "popular", "no", "no")]
    found = measures("pope", scored("pope", *rows))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["random/accuracy"], found["popular/accuracy"]) == (1.0, 0.5)
    assert (found["popular/precision"], found["popular/yes_ratio"]) == (0.0, 0.5)


def test_mme_by_hand() -> None:
    """Group one: 3 of 4 questions and 1 of 2 pictures, 75 + 50; group two: all of one picture, 100 + 100."""
    rows = [
        ("a", "color", "yes", "yes"), ("a", "color", "no", "no"), ("b", "color", "yes", "yes"),
        ("b", "color", "yes", "no"),
        ("a", "code", "Yes", "yes"), ("a", "code", "No.", "no"),
    ]  # fmt: skip
    found = measures("mme", scored("mme", *rows))
    assert found["score"] == pytest.approx(125 + 200)
    assert (found["color/score"], found["code/score"]) == (125, 200)
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["accuracy_plus"] == pytest.approx(2 / 3)
    assert found["color/accuracy_plus"] == 0.5


def test_a_circular_question_is_right_in_every_turn() -> None:
    turns = [("q", "A", "A"), ("q", "B", "B"), ("r", "A", "A"), ("r", "A", "B")]
    answers = [
        Scored(question, "a", "", said, right, score("circular", said, [right], ("one", "two")))
        for question, said, right in turns
    ]
    assert scores("circular", answers) == {"q": 1.0, "r": 0.0}
    assert measures("circular", answers) == {"accuracy": 0.5, "turns": 0.75}


def test_other_types_report_their_mean() -> None:
    rows = [("a", "", "red", "red"), ("b", "", "blue", "red")]
    assert measures("exact", scored("exact", *rows)) == {"accuracy": 0.5}
