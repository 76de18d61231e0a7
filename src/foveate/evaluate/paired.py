"""How sure a mean and a difference of means are: bootstrap intervals, and a sign test of the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from foveate.core import FoveateError

DRAWS = 10_000
_AT_ONCE = 4_000_000  # numbers drawn together


@dataclass(frozen=True)
class Difference:
    """A rival's scores less those of what it is compared with, question by question.

    Attributes:
        mean: of the differences, from -1 to 1.
        interval: its 95 % bootstrap interval.
        better, worse: questions with a higher and with a lower score; the others are equal.
        p: of the two-sided sign test: how likely as uneven a split is where neither is better.
    """

    mean: float
    interval: tuple[float, float]
    better: int
    worse: int
    p: float


def bootstrap(values: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a mean, by drawing as many values with replacement (Efron 1979).

    Args:
        values: at least one.

    Raises:
        FoveateError: no value.
    """
    if not values:
        raise FoveateError("no value was given, of which no mean can be said; give at least one")
    drawn = numpy.random.default_rng(seed)
    array = numpy.asarray(values, dtype=numpy.float64)
    rows = max(1, _AT_ONCE // len(array))
    means = [
        array[drawn.integers(0, len(array), size=(min(rows, draws - start), len(array)))].mean(axis=1)
        for start in range(0, draws, rows)
    ]
    low, high = numpy.percentile(numpy.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of `better` against `worse` of as many coins: exact, ties left out (Arbuthnott's test)."""
    count = better + worse
    if count == 0:
        return 1.0
    tail = sum(math.comb(count, heads) for heads in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)  # whole numbers, which have no limit


def difference(rival: Sequence[float], base: Sequence[float]) -> Difference:
    """Scores of a rival less those of another on the same questions.

    Args:
        rival, base: scores in the same order of questions, at least one.

    Raises:
        FoveateError: their numbers differ, or there are none.
    """
    if len(rival) != len(base):
        raise FoveateError(f"{len(rival)} scores are compared with {len(base)}; give those of the same questions")
    found = [one - other for one, other in zip(rival, base, strict=True)]
    better, worse = sum(one > 0 for one in found), sum(one < 0 for one in found)
    return Difference(
        float(numpy.mean(found)) if found else 0.0, bootstrap(found), better, worse, sign_test(better, worse)
    )
