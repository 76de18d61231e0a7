"""Says how right a predicted answer is, one rule per kind of question."""

from __future__ import annotations

import re

from foveate.core import FoveateError, did_you_mean
from foveate.scenes.questions import KINDS

_WORD = re.compile(r"[^\W_]+")


def score(kind: str, prediction: str, answer: str) -> float:
    """The score of `prediction`, from 0 to 1.

    For one-word answers it is 1.0 if the first word is the answer, else 0.0. For `describe` it is the share of words
    that are right in their places: the number of positions where both texts hold the same word, over the number of
    words of the longer text, so that neither a cut answer nor a long one gains. Case, punctuation and markup such as
    `<eos>` do not count; an empty prediction scores 0.0.

    Raises:
        FoveateError: a kind that does not exist, or an `answer` without words.
    """
    if kind not in KINDS:
        raise FoveateError(f"unknown kind of question {kind!r}; {did_you_mean(str(kind), KINDS)}")
    predicted, right = _words(prediction), _words(answer)
    if not right:
        raise FoveateError(f"answer={answer!r} holds no word to compare with")
    if kind != "describe":
        return float(predicted[:1] == right[:1])
    return sum(one == other for one, other in zip(predicted, right, strict=False)) / max(len(predicted), len(right))


def _words(text: str) -> list[str]:
    return _WORD.findall(re.sub(r"<[^<>\s]*>", " ", text).casefold())
