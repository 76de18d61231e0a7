"""Writes short answers alike before they are compared, as VQA's accuracy does: case, articles, numbers, punctuation."""

from __future__ import annotations

import re

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
# What stands before the letters that an apostrophe cuts off; words that mean something else without it are left alone.
_CUT = {
    "'t": "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren won"
    " wouldn",
    "'ve": "could i might must should they we what where who would you",
    "'s": "he how she somebody someone something that there what when where who why",
    "'ll": "how it somebody someone something they what who you",
    "'d": "how it somebody someone something there they where who you",
    "'re": "there they what why you",
    "'m": "i",
}
CONTRACTIONS = {stem + end[1:]: stem + end for end, stems in _CUT.items() for stem in stems.split()} | {
    "oclock": "o'clock",
    "maam": "ma'am",
    "yall": "y'all",
}
"""Contractions by how they are written without their apostrophe."""

_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_PERIODS = re.compile(r"(?<!\d)\.|\.(?!\d)")
_APOSTROPHES = re.compile("[\u2018\u2019]")  # curly ones
_PUNCTUATION = re.compile(r"[^\w\s.':]|_")


def alike(answer: str) -> str:
    """An answer as VQA's accuracy compares it (https://visualqa.org/evaluation.html).

    Lower case; no periods but decimal points; `100,978` is `100978`; other punctuation, but for apostrophes and colons,
    is a space; number words up to ten are digits, and `none` is 0; no articles; contractions have their apostrophe.
    """
    text = _APOSTROPHES.sub("'", answer.lower())
    text = _PUNCTUATION.sub(" ", _PERIODS.sub("", _THOUSANDS.sub("", text)))
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
