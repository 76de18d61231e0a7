"""From a raster to its windows, and from scores to the best tokens of every window.

Shapes: B images, N = h * w tokens, W windows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from foveate.core import Grid
from foveate.ops.subsets import descending


def windows(grid: Grid, side: int, device: torch.device | None = None) -> Tensor:
    """Cut an h x w raster into side x side windows, as even as possible: (h * w,) window of each token, from 0.

    A raster of fewer rows or columns than `side` has as many windows in that direction.
    """
    height, width = grid
    row = torch.arange(height, device=device) * min(side, height) // height
    column = torch.arange(width, device=device) * min(side, width) // width
    return (row[:, None] * min(side, width) + column).flatten()


def best_of_windows(scores: Tensor, grid: Grid, side: int, count: int) -> Tensor:
    """The `count` places (B, count) that the windows give in turn: the best of each, then the second best of each, ...

    Of a round that is not needed whole, the places of highest score. Ties: the lowest place wins.

    Args:
        scores: (B, N) of a raster of shape `grid`, cut into side x side windows.
        count: 0..N.
    """
    order = descending(scores)
    member = one_hot(windows(grid, side, scores.device)[order], side * side)
    round_of = member.cumsum(dim=1).mul(member).sum(dim=-1)
    return order.gather(1, round_of.sort(dim=-1, stable=True).indices)[:, :count]
