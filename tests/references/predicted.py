"""Tokens that their neighbours predict, token by token as the paper says it, and frames by what stood there before."""

from __future__ import annotations

from torch import Tensor


def distance(left: Tensor, right: Tensor, metric: str) -> float:
    difference = (left - right).abs()
    if metric == "max":
        return float(difference.max())
    return float(difference.mean() if metric == "mae" else difference.square().mean().sqrt())


def one_by_one(
    image: Tensor,
    grid: tuple[int, int],
    threshold: float,
    metric: str,
    anchored: bool,
    before: Tensor | None = None,
) -> tuple[list[bool], Tensor]:
    """Which tokens of a picture (N, P) stay, and the values (N, P) that later comparisons see.

    Args:
        before: those of the frame before.
    """
    height, width = grid
    values, own = image.clone().view(height, width, -1), image.view(height, width, -1)
    past = None if before is None else before.view(height, width, -1)

    def alike(left: Tensor, right: Tensor) -> bool:
        return distance(left, right, metric) <= threshold

    stays = []
    for y in range(height):
        for x in range(width):
            if y == x == 0:
                stays.append(True)
                continue
            guess = values[y, x - 1] if x else values[y - 1, 0]
            if x and y and alike(values[y - 1, x - 1], guess) and not alike(values[y - 1, x - 1], values[y - 1, x]):
                guess = values[y - 1, x]
            beside = [(y, x - 1)] * (x > 0) + [(y - 1, x)] * (y > 0)
            if past is not None and all(alike(values[place], past[place]) for place in beside):
                guess = past[y, x]
            stays.append(not alike(own[y, x], guess))
            if anchored and not stays[-1]:
                values[y, x] = guess
    return stays, values.flatten(0, 1)


def of_video(frames: Tensor, grid: tuple[int, int], threshold: float, metric: str, anchored: bool) -> list[list[bool]]:
    """The same of each frame (F, N, P) of a video, compared with the one before."""
    found, before = [], None
    for frame in frames:
        stays, before = one_by_one(frame, grid, threshold, metric, anchored, before)
        found.append(stays)
    return found
