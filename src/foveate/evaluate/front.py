"""The Pareto front: rivals that nothing cheaper, and nothing of the same price, beats."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points on the front, by rising cost; of equal points the first one.

    Args:
        points: (cost, worth) of each; less cost and more worth are better.
    """
    found: list[int] = []
    best = float("-inf")
    for number in sorted(range(len(points)), key=lambda number: (points[number][0], -points[number][1])):
        if points[number][1] > best:
            best = points[number][1]
            found.append(number)
    return found
