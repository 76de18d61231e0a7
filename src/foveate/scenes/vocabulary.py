"""The words of the scenes: names of pictograms, colours of discs, digits, and all that questions and answers use."""

from __future__ import annotations

from collections.abc import Iterable

SPECIAL: tuple[str, ...] = ("<pad>", "<bos>", "<eos>", "<image>", "USER", "ASSISTANT")

_GRAMMAR = "? a behind color describe how is left many no number objects of on right the there what yes"

_NAMES = (
    "dog cat horse cow pig frog bear panda lion monkey rabbit fox chicken penguin fish whale turtle snake bee "
    "butterfly apple banana grapes lemon cherry pizza burger cake bread car bus train airplane rocket bicycle ship "
    "house tree flower moon star clock key book phone guitar ball umbrella"
)

GRAMMAR: tuple[str, ...] = tuple(_GRAMMAR.split())

NAMES: tuple[str, ...] = tuple(_NAMES.split())

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 40),
    "purple": (150, 50, 200),
    "orange": (250, 140, 20),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}

DIGITS: tuple[str, ...] = tuple("0123456789")

# A word's place in this tuple is its token id.
WORDS: tuple[str, ...] = (*SPECIAL, *GRAMMAR, *NAMES, *COLORS, *DIGITS)


def _ids(group: Iterable[str]) -> slice:
    words = list(group)
    first = WORDS.index(words[0])
    return slice(first, first + len(words))


# Where the token ids of each kind of word are: they stand side by side.
NAME_IDS, COLOR_IDS, DIGIT_IDS = (_ids(group) for group in (NAMES, COLORS, DIGITS))
