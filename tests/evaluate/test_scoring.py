"""Scores of single answers on examples worked by hand from the definitions of the benchmarks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import FoveateError
from foveate.evaluate import scoring
from foveate.evaluate.scoring import RULES, score
from foveate.evaluate.vqa_words import CONTRACTIONS, alike

SAID = st.text(max_size=20)


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        # The rules of visualqa.org/evaluation.html, with its own examples where it has some.
        ("The Dogs", "dogs"),
        ("a man and an umbrella", "man and umbrella"),
        ("Blue.", "blue"),
        ("1.5", "1.5"),
        ("U.S.A.", "usa"),
        ("two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("can\u2019t", "can't"),
        ("its", "its"),  # a word of its own
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("red, white", "red white"),
        ("rock-n-roll", "rock n roll"),
        (" new\nline\t ", "new line"),
        ("???", ""),
    ],
)
def test_answers_are_written_alike(written: str, compared: str) -> None:
    assert alike(written) == compared


@given(SAID)
def test_writing_alike_twice_changes_nothing(text: str) -> None:
    assert alike(alike(text)) == alike(text)


def test_contractions_are_no_other_words() -> None:
    assert not {"its", "well", "were", "ill", "id", "wed", "shell", "hell", "shed", "lets"} & CONTRACTIONS.keys()
    assert all(written == said.replace("'", "") for written, said in CONTRACTIONS.items())


@pytest.mark.parametrize(("matching", "right"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_by_how_many_of_ten_people_agree(matching: int, right: float) -> None:
    """Two of ten: eight subsets of nine hold both, 2/3 each, and two hold one, 1/3 each: 6 of 10."""
    people = ["Yes."] * matching + [f"other {number}" for number in range(10 - matching)]
    assert score("vqa", "the yes", people) == pytest.approx(right)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Yes", "yes"), ("yes, there is a dog", "yes"), ("No.", "no"), ("NO there is not", "no"),
        (" \u201cyes\u201d", "yes"),
        ("There is no dog", None), ("Yesterday", None), ("not at all", None), ("", None), ("...", None),
    ],
)  # fmt: skip
def test_yes_or_no_is_the_first_word(said: str, read: str | None) -> None:
    assert scoring.yes_or_no(said) == read
    assert score("pope", said, ["yes"]) == float(read == "yes")
    assert score("pope", said, ["no"]) == float(read == "no")


@pytest.mark.parametrize(
    ("said", "read"), [("Yes", "yes"), ("no", "no"), ("not at all", "no"), ("A: no", None), ("a no", "no"), ("", None)]
)
def test_mme_reads_the_first_four_letters(said: str, read: str | None) -> None:
    assert scoring.begins_with_yes_or_no(said) == read
    assert score("mme", said, ["no"]) == float(read == "no")


OPTIONS = ("cat", "A dog", "the Moon")


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. A dog", "B"), ("B: A dog", "B"), ("[B] because", "B"),
        ("The answer is B.", "B"), ("the answer is (b)", "B"), ("Answer: B", "B"),
        ("The answer is a dog.", "B"), ("The answer is C", "C"), ("The answer is option B", "B"),
        ("C, since A is wrong. Answer: B", "B"),
        ("a dog", "B"), ("A dog.", "B"), ("THE MOON", "C"), ("cat", "A"),
        ("D", None), ("The answer is D", None), ("A dog and a cat", None), ("both", None), ("", None),
        ("The answer is brown", None), ("dog", None),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_names(said: str, letter: str | None) -> None:
    for right in "ABC":
        assert score("choice", said, [right], OPTIONS) == score("circular", said, [right], OPTIONS)
        assert score("choice", said, [right], OPTIONS) == float(letter == right)


def test_options_of_the_same_text_are_told_apart_by_letter_only() -> None:
    assert scoring.chosen_option("cat", ("cat", "Cat.")) is None
    assert scoring.chosen_option("B", ("cat", "Cat.")) == 1


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        ("Sitting", ["kitten"], 1 - 3 / 7),  # Levenshtein's own pair: two exchanged, one put in
        ("kitten", ["SITTING ", "kitten!"], 1 - 1 / 7),  # the nearest answer counts
        ("abcd", ["abxy"], 0.0),  # half of the letters differ: as wrong as can be
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("", ["a"], 0.0),
        ("same", ["same"], 1.0),
    ],
)
def test_anls_by_hand(said: str, answers: list[str], right: float) -> None:
    assert score("anls", said, answers) == pytest.approx(right)


@given(SAID, SAID, SAID)
def test_edits_are_a_distance(first: str, second: str, third: str) -> None:
    there = scoring.edits(first, second)
    assert there == scoring.edits(second, first)
    assert (there == 0) == (first == second)
    assert abs(len(first) - len(second)) <= there <= max(len(first), len(second))
    assert scoring.edits(first, third) <= there + scoring.edits(second, third)


@pytest.mark.parametrize(
    ("said", "right"), [("Red", 1), (" red. ", 1), ("dark  blue", 1), ("dark-blue", 0), ("a red car", 0), ("", 0)]
)
def test_exact_answers(said: str, right: float) -> None:
    assert score("exact", said, ["red", "Dark blue"]) == right


@pytest.mark.parametrize("name", RULES)
@given(said=SAID)
def test_every_score_is_between_0_and_1(name: str, said: str) -> None:
    answers = {"vqa": ["a"] * 10, "pope": ["yes"], "mme": ["no"], "choice": ["A"], "circular": ["B"]}.get(name, ["ab"])
    assert 0 <= score(name, said, answers, OPTIONS) <= 1


def test_an_unknown_type_names_the_others() -> None:
    with pytest.raises(FoveateError, match="unknown type of question 'vqav2'; did you mean 'vqa'"):
        score("vqav2", "", [""])
