"""How right one answer is, from 0 to 1, by the rules of the field's benchmarks."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveate.core import FoveateError, did_you_mean
from foveate.evaluate.vqa_words import alike

FEWEST_PEOPLE = 4
"""Answers of a question of type `vqa`: with fewer none can be wholly right."""

FARTHEST = 0.5
"""Of ANLS: answers of which this share of letters differs, or more, count as wrong."""

_WORD = re.compile(r"[^\W_]+")
_BEHIND = re.compile(r"\banswer(?:\s+is|\s*:)\s*(?:option\s+)?(.*)", re.IGNORECASE | re.DOTALL)
_ALONE = re.compile(r"\s*[(\[]?([A-Za-z])[)\].:]?\s*")
_FIRST = re.compile(r"\s*[(\[]?([A-Za-z])(?:[)\].:,;]|\s*$)")  # `A` before a space is an article
_CAPITAL = re.compile(r"\s*[(\[]?([A-Z])[)\].:,;]")
_EDGES = string.punctuation + string.whitespace


@dataclass(frozen=True)
class Rule:
    """How answers of one type of question are scored.

    Attributes:
        score: (prediction, right answers, options) -> from 0 to 1.
        answers: the right answers that a question may have, or None for any number of at least one.
        closed: the only answers that there are, or () for any text.
        options: whether a question has options, which are called A, B, ...
        words: what is counted, for messages and documents.
    """

    score: Callable[[str, Sequence[str], Sequence[str]], float]
    answers: range | None = None
    closed: tuple[str, ...] = ()
    options: bool = False
    words: str = ""


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA's accuracy: a third for each person who gave this answer, at most 1, averaged over all but one of them.

    Source: Antol et al. 2015 and https://visualqa.org/evaluation.html. Texts are compared as `alike` writes them.

    Args:
        answers: of the people who were asked, ten as published.
    """
    said, people = alike(prediction), [alike(answer) for answer in answers]
    matches = [said == answer for answer in people]
    return sum(min(1.0, (sum(matches) - one) / 3) for one in matches) / len(people)


def yes_or_no(prediction: str) -> str | None:
    """`yes` or `no` where that is the first word, else None; case and punctuation do not count."""
    first = _WORD.search(prediction.casefold())
    return first[0] if first and first[0] in ("yes", "no") else None


def begins_with_yes_or_no(prediction: str) -> str | None:
    """`yes` or `no` where the first four letters hold it, as MME reads answers, else None."""
    begin = prediction.strip().casefold()[:4]
    return next((word for word in ("yes", "no") if word in begin), None)


def chosen_option(prediction: str, options: Sequence[str]) -> int | None:
    """The place of the option that an answer names, or None.

    In this order: a letter alone; one behind "answer is" or "answer:"; a capital at the beginning; the text of one
    option, all of the answer or all behind those words. A letter among other words is followed by a bracket, a full
    stop, a colon or a comma, so that an article is none; case and the punctuation around a text do not count.
    """
    behind = _BEHIND.search(prediction)
    said = behind[1] if behind else prediction
    letters = (_ALONE.fullmatch(prediction), behind and _FIRST.match(said), _CAPITAL.match(prediction))
    for found in letters:
        if found and (place := string.ascii_uppercase.index(found[1].upper())) < len(options):
            return place
    places = [place for place, option in enumerate(options) if plain(option) == plain(said)]
    return places[0] if len(places) == 1 else None


def likeness(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity with the nearest answer, 0 where half of it differs: what ANLS averages.

    Source: Biten et al. 2019, equation 1, with its threshold of 0.5. Case and space around the texts do not count.
    """
    return max(_likeness(prediction.strip().casefold(), answer.strip().casefold()) for answer in answers)


def plain(text: str) -> str:
    """A text without case, without the punctuation and space around it, with one space between words."""
    return " ".join(text.casefold().split()).strip(_EDGES)


def edits(first: str, second: str) -> int:
    """Levenshtein's distance: letters put in, taken out or exchanged."""
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        before, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != other))
    return row[-1]


def _likeness(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    distance = edits(first, second) / longest if longest else 0.0
    return 1 - distance if distance < FARTHEST else 0.0


def _yes_no(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    return float(yes_or_no(prediction) == answers[0])


def _begin(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    return float(begins_with_yes_or_no(prediction) == answers[0])


def _choice(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    place = chosen_option(prediction, options)
    return float(place is not None and string.ascii_uppercase[place] == answers[0])


YES_NO = ("yes", "no")
RULES: dict[str, Rule] = {
    "vqa": Rule(
        lambda prediction, answers, options: vqa_accuracy(prediction, answers),
        answers=range(FEWEST_PEOPLE, 1_000),
        words="people who gave this answer, three of them for all of it",
    ),
    "pope": Rule(_yes_no, answers=range(1, 2), closed=YES_NO, words="the first word, yes or no"),
    "mme": Rule(_begin, answers=range(1, 2), closed=YES_NO, words="yes or no at the beginning, and both of a picture"),
    "choice": Rule(_choice, answers=range(1, 2), options=True, words="the letter, or the text of an option"),
    "circular": Rule(_choice, answers=range(1, 2), options=True, words="the option, in every turn of the options"),
    "anls": Rule(lambda prediction, answers, options: likeness(prediction, answers), words="letters that differ"),
    "exact": Rule(
        lambda prediction, answers, options: float(plain(prediction) in map(plain, answers)),
        words="the whole answer, but for case and the punctuation around it",
    ),
}
"""Every type of question by its name."""


def rule(name: str) -> Rule:
    """The rule of a type of question.

    Raises:
        FoveateError: there is no such type.
    """
    if name not in RULES:
        raise FoveateError(f"unknown type of question {name!r}; {did_you_mean(str(name), RULES)}")
    return RULES[name]


def score(name: str, prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """The score of a prediction, from 0 to 1, by the rule of its type of question.

    Args:
        name: one of `RULES`.
        answers: those that are right; of a question with options the letter of the right one.

    Raises:
        FoveateError: there is no such type.
    """
    return rule(name).score(prediction, answers, options)
