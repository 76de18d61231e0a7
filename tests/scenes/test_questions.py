"""Questions follow from the table of objects, and every word of them is in the vocabulary."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core import FoveateError
from foveate.scenes.generator import Scenes, generate
from foveate.scenes.questions import KINDS, Question, questions, sample
from foveate.scenes.vocabulary import COLORS, NAMES, WORDS


def table(*pictures):
    """Scenes that hold the given (name, colour, digit) triples; nothing is drawn."""
    names, colors, digits = (torch.full((len(pictures), 7), -1) for _ in range(3))
    for row, things in enumerate(pictures):
        for place, (name, color, digit) in enumerate(things):
            names[row, place] = NAMES.index(name)
            colors[row, place] = list(COLORS).index(color)
            digits[row, place] = digit
    pixels = torch.zeros(len(pictures), 3, 1, 1, dtype=torch.uint8)
    boxes = torch.where(names >= 0, 0, -1)[..., None].expand(-1, -1, 4)
    return Scenes(pixels, (names >= 0).sum(1), names, colors, digits, boxes)


FARM = [("dog", "red", 3), ("umbrella", "black", 0)]
SHELF = [("cake", "white", 9)]


def test_every_question_of_a_picture():
    asked = questions(table(SHELF, FARM), 1, random.Random(0))
    missing = [question for question in asked if question.answer == "no"]
    assert [question for question in asked if question.answer != "no"] == [
        Question("existence", "is there a dog ?", "yes", 0),
        Question("existence", "is there a umbrella ?", "yes", 1),
        Question("color", "what color is behind the dog ?", "red", 0),
        Question("color", "what color is behind the umbrella ?", "black", 1),
        Question("digit", "what number is on the dog ?", "3", 0),
        Question("digit", "what number is on the umbrella ?", "0", 1),
        Question("count", "how many objects ?", "2", None),
        Question("describe", "describe", "dog red 3 umbrella black 0", None),
    ]
    assert len({question.text for question in missing}) == 2
    for question in missing:
        assert (question.kind, question.target) == ("existence", None)
        name = question.text.removeprefix("is there a ").removesuffix(" ?")
        assert name in NAMES and name not in ("dog", "umbrella")


def test_the_same_generator_asks_the_same():
    scenes = generate(2, seed=1)
    assert questions(scenes, 1, random.Random(4)) == questions(scenes, 1, random.Random(4))
    assert questions(scenes, 1, random.Random(4)) != questions(scenes, 1, random.Random(5))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), row=st.integers(0, 31))
def test_all_words_are_in_the_vocabulary_and_answers_match_the_table(seed, row):
    for question in questions(SCENES, row, random.Random(seed)):
        assert set(question.text.split()) | set(question.answer.split()) <= set(WORDS)
        check(SCENES, row, question)


SCENES = generate(32, seed=2, split="test")


def check(scenes, row, question):
    """The answer read straight off the tensors."""
    count = int(scenes.count[row])
    words = question.text.split()
    if question.kind == "count":
        assert question.answer == str(count)
    elif question.kind == "describe":
        answer = question.answer.split()
        assert [NAMES.index(word) for word in answer[0::3]] == scenes.names[row, :count].tolist()
        assert [list(COLORS).index(word) for word in answer[1::3]] == scenes.colors[row, :count].tolist()
        assert [int(word) for word in answer[2::3]] == scenes.digits[row, :count].tolist()
    else:
        place = scenes.names[row].tolist().index(NAMES.index(words[-2])) if question.answer != "no" else None
        assert question.target == place
        if question.kind == "existence":
            assert (NAMES.index(words[-2]) in scenes.names[row].tolist()) == (question.answer == "yes")
        if question.kind == "color":
            assert list(COLORS)[scenes.colors[row, place]] == question.answer
        if question.kind == "digit":
            assert int(scenes.digits[row, place]) == int(question.answer)


def test_sample_asks_one_right_question_per_picture():
    asked = sample(SCENES, seed=9)
    assert len(asked) == 32
    for row, question in enumerate(asked):
        check(SCENES, row, question)
    assert asked == sample(SCENES, seed=9)
    assert asked != sample(SCENES, seed=10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kinds=st.lists(st.sampled_from(KINDS), min_size=1, unique=True))
def test_sample_balances_kinds_and_yes_with_no(seed, kinds):
    asked = sample(SCENES, seed=seed, kinds=kinds)
    counts = Counter(question.kind for question in asked)
    assert set(counts) == set(kinds)
    assert max(counts.values()) - min(counts.values()) <= 1
    answers = Counter(question.answer for question in asked if question.kind == "existence")
    assert abs(answers["yes"] - answers["no"]) <= 1


def test_one_kind_may_be_a_plain_word():
    assert {question.kind for question in sample(SCENES, seed=0, kinds="digit")} == {"digit"}


def test_targets_vary_when_there_are_several_objects():
    scenes = table(*[FARM] * 40)
    targets = Counter(question.target for question in sample(scenes, seed=0, kinds=["color"]))
    assert targets[0] > 8 and targets[1] > 8


def test_unknown_and_missing_kinds_are_named():
    with pytest.raises(FoveateError, match=r"unknown kind of question 'colour'; did you mean 'color'\?"):
        sample(SCENES, seed=0, kinds=["count", "colour"])
    with pytest.raises(FoveateError, match=r"kinds is empty; give at least one of: existence, color"):
        sample(SCENES, seed=0, kinds=[])
