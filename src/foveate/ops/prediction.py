"""Tokens that their neighbours predict: which pixels of a raster repeat those to the left or above, row by row.

Shapes: h x w tokens of a picture, N = h * w of them in raster order, P pixel values in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from foveate.core import Grid

Metric: TypeAlias = Literal["max", "mae", "rmse"]

_IN_CACHE = 65_536  # values that are compared at a time
_NARROW = 256  # pixel values of a token, below which numpy reduces faster over the outer axis


def unpredicted(pixels: Tensor, grid: Grid, threshold: float, metric: Metric = "max", anchored: bool = True) -> Tensor:
    """Which tokens of each picture differ from what is predicted of them: (B, N, P) -> (B, N) bool.

    A token is predicted from three neighbours: from the one above where the corner above left is like the one to the
    left and unlike the one above, else from the one to the left; in the first row from the left, in the first column
    from above. Two tokens are alike whose distance is `threshold` or less. The first token is predicted by none.

    Args:
        grid: (h, w).
        metric: largest absolute difference, their mean, or the root of the mean square.
        anchored: a token that is like its prediction takes the prediction's values for the comparisons that follow, so
            that small differences do not add up.
    """
    if anchored and not (metric == "max" and threshold == 0):  # equality hands itself on
        rows = [_anchored(image, grid, threshold, metric) for image in pixels.detach()]
        return torch.stack(rows).to(pixels.device)
    return torch.stack([_compared(image.unflatten(0, grid), threshold, metric) for image in pixels])


def _distance(difference: Tensor, metric: Metric) -> Tensor:
    """(..., P) -> (...); writes over what it is given."""
    if metric == "max":
        return difference.abs_().amax(dim=-1)
    return difference.abs_().mean(dim=-1) if metric == "mae" else difference.square_().mean(dim=-1).sqrt_()


def _compared(image: Tensor, threshold: float, metric: Metric) -> Tensor:
    """(h, w, P) -> (N,), from the tokens' own values."""
    height, width = image.shape[:2]
    to_left, to_above = (torch.zeros(height, width, dtype=torch.bool, device=image.device) for _ in range(2))
    # On a processor, some rows at a time stay in its cache.
    step = height if image.is_cuda else max(1, _IN_CACHE // image[0].numel())
    for top in range(0, height, step):
        end, first = min(height, top + step), max(1, top)
        rows = image[top:end]
        to_left[top:end, 1:] = _distance(rows[:, 1:] - rows[:, :-1], metric) <= threshold
        if end > first:
            to_above[first:end] = _distance(image[first:end] - image[first - 1 : end - 1], metric) <= threshold
    same = to_left.clone()
    same[1:, 0] = to_above[1:, 0]
    from_above = to_above[1:, :-1] & ~to_left[:-1, 1:]
    same[1:, 1:] = to_above[1:, 1:].where(from_above, to_left[1:, 1:])
    return ~same.flatten()


def _anchored(pixels: Tensor, grid: Grid, threshold: float, metric: Metric) -> Tensor:
    """(N, P) -> (N,), diagonal by diagonal: what a token is compared with stands on the two before its own.

    Three buffers hold the anchored values of a diagonal, those of row r at r + 1. Beside its ends stand copies: a token
    of the first row finds its left neighbour above it, too, and one of the first column the one above to its left.
    """
    height, width = grid
    values, alike = _tools(pixels, threshold, metric)
    buffers = [np.zeros((height + 2, values.shape[1]), values.dtype) for _ in range(3)]
    # Of each buffer, what stands above and what stands to the left of every row's next token.
    pairs = [as_strided(one, (2, height + 1, one.shape[1]), (one.strides[0], *one.strides)) for one in buffers]
    buffers[0][:3] = values[0]
    kept = np.ones(height * width, dtype=bool)
    step = max(1, width - 1)
    for diagonal in range(1, height + width - 1):
        low, high = max(0, diagonal - width + 1), min(height, diagonal + 1)
        first = low * (width - 1) + diagonal
        cells = slice(first, first + (high - low - 1) * step + 1, step)
        last, old, new = (diagonal - 1) % 3, buffers[(diagonal - 2) % 3], buffers[diagonal % 3]
        both = pairs[last][:, low:high]
        like_above, like_left = alike(both, old[low:high])
        guess = np.where((like_left > like_above)[:, None], *both)
        own = values[cells]
        kept[cells] = unlike = ~alike(own, guess)
        np.copyto(guess, own, where=unlike[:, None])
        new[low + 1 : high + 1] = guess
        new[0], new[high + 1] = new[1], new[high]
    return torch.from_numpy(kept)


def _tools(pixels: Tensor, threshold: float, metric: Metric) -> tuple[Any, Callable[[Any, Any], Any]]:
    """The values as numpy has them, and which (..., n) of two sets of tokens (..., n, P) are alike."""
    values = pixels.contiguous().cpu().numpy()
    limit = values.dtype.type(threshold)
    if metric != "max":  # sums are rounded as the authors' are
        return values, lambda left, right: (
            _distance(torch.from_numpy(np.subtract(left, right)), metric) <= threshold
        ).numpy()

    def alike(left: Any, right: Any) -> Any:
        difference = np.subtract(left, right, order="F" if values.shape[1] < _NARROW else "C")
        return np.abs(difference, out=difference).max(axis=-1) <= limit

    return values, alike
