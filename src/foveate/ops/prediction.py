"""Tokens that their neighbours predict: which pixels of a raster repeat those to the left, above or a frame before.

Shapes: F frames of a video, or one picture, of h x w tokens in raster order, P pixel values in each; N all F * h * w.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.core import Grid
from foveate.ops.device import of_cpu
from foveate.ops.repeats import Metric, Tokens, distance


def unpredicted(
    pixels: Tensor, grid: Grid, threshold: float, metric: Metric = "max", anchored: bool = True, frames: bool = False
) -> Tensor:
    """Which tokens of each picture differ from what is predicted of them: (B, h * w, P) -> (B, h * w) bool.

    A token is predicted from three neighbours: from the one above where the corner above left is like the one to the
    left and unlike the one above, else from the one to the left; in the first row from the left, in the first column
    from above. Two tokens are alike whose distance is `threshold` or less. The first token is predicted by none.

    Args:
        pixels: finite.
        grid: (h, w).
        metric: largest absolute difference, their mean, or the root of the mean square.
        anchored: a token that is like its prediction takes the prediction's values for the comparisons that follow, so
            that small differences do not add up.
        frames: the pictures are frames of one video, each behind the one before: a token whose neighbours to the left
            and above are like those of the frame before is predicted from its own place there.

    Returns:
        On the host, where anchors are followed; else where the pixels are.
    """
    anchored = anchored and not (metric == "max" and threshold == 0)  # equality hands itself on
    if pixels.device.type != "cpu" and not anchored:
        return _on_device(pixels.detach(), grid, threshold, metric, frames)
    host = of_cpu(pixels) if pixels.device.type == "cpu" else pixels.detach().cpu()
    videos = [host] if frames else host.split(1)
    return torch.cat([_on_host(video, grid, threshold, metric, anchored) for video in videos])


def _kinds(like: Tensor) -> Tensor:
    """By which neighbour a token is predicted: 0 the one beside it, 1 the one above, 2 the one a frame before.

    Args:
        like: (3, F, h, w) bool, whether they are alike.
    """
    beside, above, before = like
    kind = torch.zeros(beside.shape, dtype=torch.int64, device=like.device)
    kind[:, 1:, 1:] = above[:, 1:, :-1] & ~beside[:, :-1, 1:]
    if len(kind) > 1:
        still = torch.ones_like(beside)
        still[:, :, 1:] &= before[:, :, :-1]
        still[:, 1:] &= before[:, :-1]
        still[0] = False
        kind.masked_fill_(still, 2)
    return kind


def _unlike(like: Tensor) -> Tensor:
    """(3, F, h, w) -> (F, h * w): which tokens differ from what is predicted by their neighbours' own values."""
    unlike = ~like.gather(0, _kinds(like)[None])[0].flatten(1)
    unlike[:, 0] = True
    return unlike


def _on_device(pixels: Tensor, grid: Grid, threshold: float, metric: Metric, frames: bool) -> Tensor:
    """(B, h * w), from the tokens' own values, all of them compared."""
    rasters = pixels.unflatten(1, grid)
    like = torch.zeros((3, *rasters.shape[:3]), dtype=torch.bool, device=pixels.device)
    for number, raster in enumerate(rasters):
        like[0, number, :, 1:] = distance(raster[:, 1:] - raster[:, :-1], metric) <= threshold
        like[1, number, 1:] = distance(raster[1:] - raster[:-1], metric) <= threshold
        if frames and number:
            like[2, number] = distance(raster - rasters[number - 1], metric) <= threshold
    like[0, :, :, 0] = like[1, :, :, 0]
    return torch.cat([_unlike(one) for one in ([like] if frames else like.split(1, dim=1))])


def _on_host(video: Tensor, grid: Grid, threshold: float, metric: Metric, anchored: bool) -> Tensor:
    """(F, h * w)."""
    raster = (len(video), *grid)
    tokens = Tokens(video.flatten(0, 1), threshold, metric)
    seen = _Neighbours(tokens, raster)
    like = torch.from_numpy(seen.like).unflatten(1, raster)
    unlike = _unlike(like)
    if anchored:
        kinds = _kinds(like).flatten().numpy()
        _Anchors(tokens, seen).follow(kinds, unlike.flatten().numpy())
    return unlike


class _Neighbours:
    """Tokens compared with the one beside, the one above, and the one a frame before.

    Attributes:
        like, equal: (3, N) bool, whether they are; the one beside a token is that to its left, in the first column that
            above. What is above another is compared only where something is predicted by it.
        known: (3, N) bool, where they were compared.
    """

    def __init__(self, tokens: Tokens, raster: tuple[int, int, int]) -> None:
        self.raster = raster
        frame, row, column = np.indices(raster).reshape(3, -1)
        self.inner, self.lower, first = column > 0, row > 0, (column == 0) & (row > 0)
        offsets, more = [1, raster[2], raster[1] * raster[2]], np.zeros(0)
        near = tokens.maybe(1, self.inner)
        asked = [self.inner, self._asked_above(near), frame > 0]
        equal, like = tokens.compare(offsets, asked)
        more = self._asked_above(like[0]) & ~asked[1]
        if more.any():  # what seemed like its left neighbour is not
            for found, those in zip((equal, like), tokens.compare([raster[2]], [more]), strict=True):
                found[1] = found[1] | those[0]
        known = [self.inner, asked[1] | more, frame > 0]
        self.equal, self.like, self.known = (
            np.stack([np.where(first, one[1], one[0]), *one[1:]]) for one in (equal, like, known)
        )

    def _asked_above(self, left: np.ndarray) -> np.ndarray:
        """Of which tokens it matters whether they are like the one above: that one is unlike a neighbour of its own."""
        width, unlike = self.raster[2], self.inner & ~left
        asked = ~self.inner
        asked[width:] |= unlike[:-width]
        asked[width - 1 : -1] |= unlike[:-width]
        return asked & self.lower


class _Anchors:
    """What stands for each token: it itself, or what stands for its prediction, where that is alike and not equal.

    What equals its prediction stands for itself as well, since the values are the same.
    """

    def __init__(self, tokens: Tokens, seen: _Neighbours) -> None:
        self.tokens, self.seen = tokens, seen
        count = seen.like.shape[1]
        self.anchor, self.exact = np.arange(count), np.ones(count, dtype=bool)

    def follow(self, kinds: np.ndarray, unlike: np.ndarray) -> None:
        """Write into `unlike` (N,) what comes out differently by what stands for the tokens, diagonal by diagonal.

        Args:
            kinds: (N,) by which neighbour a token is predicted by its own values.
        """
        _, height, width = self.seen.raster
        frame, count = height * width, len(unlike)
        like, equal = (one[kinds, np.arange(count)] for one in (self.seen.like, self.seen.equal))
        pending = like & ~equal
        if not pending.any():
            return
        row, column = (one.ravel() for one in np.indices((height, width)))
        order = np.argsort(row + column, kind="stable")
        cells = np.split(order, np.bincount(row + column).cumsum()[:-1])[1:]  # the first token stays
        reached = np.array([1, width, width + 1, frame, frame + 1, frame + width])
        for first in range(0, count, frame):
            for diagonal in cells:
                own = diagonal + first
                own = own[pending[own]]
                if not own.size:
                    continue
                unlike[own] = self._differ(own, row[own - first] > 0, column[own - first] > 0, first > 0)
                others = (own[~self.exact[own]][:, None] + reached).ravel()
                pending[others[others < count]] = True

    def _differ(self, own: np.ndarray, lower: np.ndarray, inner: np.ndarray, later: bool) -> np.ndarray:
        """Which of these tokens differ from what is predicted; notes what stands for them.

        Args:
            lower: there are tokens above them.
            inner: there are tokens to their left.
            later: there is a frame before.
        """
        width, back = self.seen.raster[2], self.seen.raster[1] * self.seen.raster[2]
        # A token of the first row finds its left neighbour above it, too.
        left, above = own - np.where(inner, 1, width), own - np.where(lower, width, 1)
        kind, guess = np.zeros(len(own), dtype=np.int64), left.copy()
        edges = np.flatnonzero(lower & inner)
        edges = edges[~self._related(0, above[edges], above[edges] - 1)]
        upward = edges[self._related(1, left[edges], left[edges] - width)]
        kind[upward], guess[upward] = 1, above[upward]
        if later:
            still = self._related(2, left, left - back) & self._related(2, above, above - back)
            kind[still], guess[still] = 2, own[still] - back
        equal = self.seen.equal[kind, own]
        same = equal | self._related(kind, own, guess, equal)
        self.anchor[own] = np.where(same, self.anchor[guess], own)
        self.exact[own] = ~same | (equal & self.exact[guess])
        return np.asarray(~same)

    def _related(self, kind: Any, tokens: np.ndarray, others: np.ndarray, sure: np.ndarray | None = None) -> np.ndarray:
        """Which tokens and their neighbours of a kind stand for values that are alike.

        Args:
            sure: (n,) these need not be looked at.
        """
        first, second = self.anchor[tokens], self.anchor[others]
        found = first == second
        trusted = self.exact[tokens] & self.exact[others] & self.seen.known[kind, tokens]
        found |= trusted & self.seen.like[kind, tokens]
        open_ = ~(found | trusted) if sure is None else ~(found | trusted | sure)
        if open_.any():
            found[open_] = self.tokens.alike(first[open_], second[open_])
        return np.asarray(found)
