"""Asks questions about scenes and knows their answers: existence, colour, digit, count and description."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from foveate.core import FoveateError, did_you_mean
from foveate.scenes.generator import Scenes
from foveate.scenes.vocabulary import COLORS, NAMES

KINDS: tuple[str, ...] = ("existence", "color", "digit", "count", "describe")

_COLORS: tuple[str, ...] = tuple(COLORS)


@dataclass(frozen=True)
class Question:
    """A question about one picture.

    Attributes:
        kind: one of `KINDS`.
        text: the question in words of the vocabulary, separated by spaces.
        answer: the right answer, likewise.
        target: which object of the picture (its place in `Scenes`) is asked about; None for a count, a description, or
            a thing that is not there.
    """

    kind: str
    text: str
    answer: str
    target: int | None


def questions(scenes: Scenes, row: int, generator: random.Random) -> list[Question]:
    """Every question that can be asked of picture `row`, kinds in the order of `KINDS`.

    Questions of existence are balanced: one per object with the answer yes, and as many with the answer no about names
    that `generator` picks among those absent.
    """
    things = _things(scenes, [row])[0]
    absent = generator.sample(_absent(things), len(things))
    asked = [_exists(things, target) for target in range(len(things))]
    asked += [_missing(name) for name in absent]
    asked += [_color(things, target) for target in range(len(things))]
    asked += [_digit(things, target) for target in range(len(things))]
    return [*asked, _count(things), _describe(things)]


def sample(scenes: Scenes, *, seed: int, kinds: Iterable[str] = KINDS) -> list[Question]:
    """One question per picture, in the order of the pictures; the same seed asks the same questions.

    The kinds, and yes and no among questions of existence, occur equally often to within one.

    Raises:
        FoveateError: a kind that does not exist, or no kind at all.
    """
    kinds = _known(kinds)
    generator = random.Random(seed)
    plan = [kinds[index % len(kinds)] for index in range(len(scenes))]
    generator.shuffle(plan)
    present = generator.random() < 0.5
    asked = []
    for kind, things in zip(plan, _things(scenes, range(len(scenes))), strict=True):
        if kind == "existence":
            present = not present
        asked.append(_one(kind, things, present, generator))
    return asked


def _known(kinds: Iterable[str]) -> tuple[str, ...]:
    chosen = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in chosen:
        if kind not in KINDS:
            raise FoveateError(f"unknown kind of question {kind!r}; {did_you_mean(str(kind), KINDS)}")
    if not chosen:
        raise FoveateError(f"kinds is empty; give at least one of: {', '.join(KINDS)}")
    return tuple(dict.fromkeys(chosen))


Things = list[tuple[str, str, str]]  # name, colour and digit of each object of one picture, in the order of `Scenes`


def _things(scenes: Scenes, rows: Sequence[int]) -> list[Things]:
    table = zip(scenes.names.tolist(), scenes.colors.tolist(), scenes.digits.tolist(), strict=True)
    words = [
        [(NAMES[name], _COLORS[color], str(digit)) for name, color, digit in zip(*picture, strict=True) if name >= 0]
        for picture in table
    ]
    return [words[row] for row in rows]


def _absent(things: Things) -> list[str]:
    there = {name for name, _, _ in things}
    return [name for name in NAMES if name not in there]


def _one(kind: str, things: Things, present: bool, generator: random.Random) -> Question:
    target = generator.randrange(len(things))
    if kind == "existence":
        return _exists(things, target) if present else _missing(generator.choice(_absent(things)))
    if kind == "color":
        return _color(things, target)
    if kind == "digit":
        return _digit(things, target)
    return _count(things) if kind == "count" else _describe(things)


def _exists(things: Things, target: int) -> Question:
    return Question("existence", f"is there a {things[target][0]} ?", "yes", target)


def _missing(name: str) -> Question:
    return Question("existence", f"is there a {name} ?", "no", None)


def _color(things: Things, target: int) -> Question:
    return Question("color", f"what color is behind the {things[target][0]} ?", things[target][1], target)


def _digit(things: Things, target: int) -> Question:
    return Question("digit", f"what number is on the {things[target][0]} ?", things[target][2], target)


def _count(things: Things) -> Question:
    return Question("count", "how many objects ?", str(len(things)), None)


def _describe(things: Things) -> Question:
    return Question("describe", "describe", " ".join(" ".join(thing) for thing in things), None)
