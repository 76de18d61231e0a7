"""Scores worked out by hand, and the bounds that hold for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import FoveateError
from foveate.scenes.questions import KINDS
from foveate.scenes.scoring import score


@pytest.mark.parametrize(
    ("kind", "prediction", "answer", "expected"),
    [
        ("color", "red", "red", 1.0),
        ("color", "Red.", "red", 1.0),
        ("color", "  red red 3 dog", "red", 1.0),
        ("color", "<bos> red <eos>", "red", 1.0),
        ("color", "the red", "red", 0.0),
        ("color", "reddish", "red", 0.0),
        ("color", "", "red", 0.0),
        ("color", " ?! ", "red", 0.0),
        ("existence", "YES, there is", "yes", 1.0),
        ("existence", "no", "yes", 0.0),
        ("digit", "7", "7", 1.0),
        ("digit", "77", "7", 0.0),
        ("digit", "7 7", "7", 1.0),
        ("count", "3\n", "3", 1.0),
        ("count", "5", "3", 0.0),
        ("describe", "dog red 3", "dog red 3", 1.0),
        ("describe", "Dog, red: 3. <eos>", "dog red 3", 1.0),
        ("describe", "dog red 4", "dog red 3", 2 / 3),
        ("describe", "dog red", "dog red 3", 2 / 3),
        ("describe", "dog red 3 cat blue 5", "dog red 3", 0.5),
        ("describe", "red dog 3", "dog red 3", 1 / 3),
        ("describe", "cat blue 5 dog red 3", "dog red 3 cat blue 5", 0.0),
        ("describe", "", "dog red 3", 0.0),
    ],
)
def test_by_hand(kind, prediction, answer, expected):
    assert score(kind, prediction, answer) == pytest.approx(expected)


@given(kind=st.sampled_from(KINDS), prediction=st.text())
def test_any_text_scores_between_0_and_1(kind, prediction):
    assert 0.0 <= score(kind, prediction, "dog red 3") <= 1.0


@given(words=st.lists(st.sampled_from(["dog", "red", "3", "cat"]), min_size=1), kind=st.sampled_from(KINDS))
def test_the_answer_itself_scores_1(words, kind):
    assert score(kind, " ".join(words), " ".join(words)) == 1.0


@given(words=st.lists(st.sampled_from(["dog", "red", "3"]), min_size=1), extra=st.integers(1, 5))
def test_a_description_that_runs_on_scores_less(words, extra):
    assert score("describe", " ".join([*words, *["dog"] * extra]), " ".join(words)) < 1.0


def test_unknown_kind_and_empty_answer_are_named():
    with pytest.raises(FoveateError, match=r"unknown kind of question 'digits'; did you mean 'digit'\?"):
        score("digits", "3", "3")
    with pytest.raises(FoveateError, match=r"answer='\?' holds no word"):
        score("color", "red", "?")
