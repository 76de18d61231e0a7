"""Intervals and tests of paired scores against numbers worked by hand, and their coverage."""

from __future__ import annotations

import numpy
import pytest

from foveate.core import FoveateError
from foveate.evaluate.paired import bootstrap, difference, sign_test


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),
        (600, 400, pytest.approx(2.8e-10, rel=0.05)),  # z = 6.29 with continuity correction: 3.1e-10
    ],
)
def test_the_sign_test_by_hand(better: int, worse: int, p: float) -> None:
    assert sign_test(better, worse) == p


def test_a_difference_counts_questions() -> None:
    found = difference([1, 0, 0.5, 1], [0, 1, 0.5, 0.25])
    assert (found.better, found.worse, found.mean) == (2, 1, pytest.approx(0.1875))
    assert found.p == 1.0
    assert found.interval[0] < found.mean < found.interval[1]
    same = difference([1, 0], [1, 0])
    assert (same.mean, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of 200 samples of 100 questions that are right with 0.7, about 190 intervals hold 0.7."""
    drawn = numpy.random.default_rng(0)
    held = 0
    for number in range(200):
        low, high = bootstrap((drawn.random(100) < 0.7).astype(float).tolist(), draws=500, seed=number)
        held += low <= 0.7 <= high
    assert 178 <= held <= 198


def test_an_interval_repeats_itself_and_shrinks() -> None:
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 1000
    assert bootstrap(few) == bootstrap(few)
    low, high = bootstrap(many)
    assert 0.47 < low < 0.5 < high < 0.53
    assert bootstrap(few)[1] - bootstrap(few)[0] > 5 * (high - low)
    assert bootstrap([0.25]) == (0.25, 0.25)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(FoveateError, match="2 scores are compared with 1"):
        difference([1, 0], [1])
    with pytest.raises(FoveateError, match="no value was given"):
        bootstrap([])
