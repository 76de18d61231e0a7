"""Which of many tokens are alike: a few of their values are compared first, and all of them only where those agree.

Shapes: N tokens of P values.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

Metric: TypeAlias = Literal["max", "mae", "rmse"]

_IN_CACHE = 65_536  # values that are compared at a time
_NARROW = 256  # values of a token, below which all are compared at once
_PROBED = 24  # values of a wider token that are looked at first
_RUN = 8  # tokens that are compared at once: where one differs, the others are looked at again
_SLACK = 1e-3  # what rounding can make of a sum, as a share of it; much less in fact

# Reads at the speed of memory, where numpy writes an answer for each value; no call is long enough to yield for.
_library = ctypes.PyDLL("msvcrt" if sys.platform == "win32" else None)
_compare = _library.memcmp
_compare.argtypes, _compare.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int


def distance(difference: Tensor, metric: Metric) -> Tensor:
    """(..., P) -> (...): the largest absolute difference, their mean or root mean square; writes over its argument."""
    if metric == "max":
        return difference.abs_().amax(dim=-1)
    return difference.abs_().mean(dim=-1) if metric == "mae" else difference.square_().mean(dim=-1).sqrt_()


def _step(width: int) -> int:
    """From one value that is looked at first to the next: no divisor of rows, so that all columns have their turn."""
    step = width // _PROBED
    while math.gcd(step, width) > 1:
        step += 1
    return step


class Tokens:
    """Tokens (N, P) on the host, and which of them are alike: whose distance is `threshold` or less."""

    def __init__(self, values: Tensor, threshold: float, metric: Metric) -> None:
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        self.values = values.contiguous().numpy()
        self.threshold, self.metric = threshold, metric
        width = self.values.shape[1]
        self.whole = width < _NARROW
        step = 1 if self.whole else _step(width)
        few = np.ascontiguousarray(self.values[:, ::step])  # in the order in which they lie in memory
        self.probes = np.ascontiguousarray(few.T)  # numpy reduces faster over the outer axis
        self._seen: dict[int, np.ndarray] = {}

    def maybe(self, offset: int, of: np.ndarray) -> np.ndarray:
        """Which tokens (N,), of those that `of` names, may be like the one so many places before.

        None is left out that is.
        """
        if offset not in self._seen:
            seen = np.zeros(len(self.values), dtype=bool)
            if offset < len(seen):
                seen[offset:] = self._near(self.probes[:, offset:], self.probes[:, :-offset])
            self._seen[offset] = seen
        return np.asarray(self._seen[offset] & of)

    def compare(self, offsets: Sequence[int], of: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Which tokens equal the ones so many places before them, and which are like them: (N,) of each offset.

        Args:
            of: of each offset, the tokens that are asked about.
        """
        near = [self.maybe(offset, one) for offset, one in zip(offsets, of, strict=True)]
        equal = self._equal(offsets, near)
        if self.metric == "max" and self.threshold == 0:
            return equal, equal
        like = []
        for offset, same, close in zip(offsets, equal, near, strict=True):
            more = np.flatnonzero(close & ~same)
            found = same.copy()
            found[more] = self._within(more, more - offset)
            like.append(found)
        return equal, like

    def alike(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which of these tokens (n,) are like those."""
        found = self._near(self.probes[:, first], self.probes[:, second])
        near = np.flatnonzero(found)
        found[near] = self._within(first[near], second[near])
        return found

    def _near(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Of some values (v, n) of each of n pairs, which may be alike; none is left out that is."""
        difference = np.subtract(first, second)
        if self.metric == "max":
            return np.asarray(np.abs(difference, out=difference).max(axis=0) <= difference.dtype.type(self.threshold))
        width, limit = self.values.shape[1], self.threshold * (1 + _SLACK)
        if self.metric == "mae":
            return np.asarray(np.abs(difference, out=difference).sum(axis=0) <= limit * width)
        return np.asarray(np.square(difference, out=difference).sum(axis=0) <= limit * limit * width)

    def _within(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which of these tokens (n,) are within the threshold of those, by all of their values."""
        if self.whole and self.metric == "max":
            return np.ones(len(first), dtype=bool)
        found = np.empty(len(first), dtype=bool)
        step = max(1, _IN_CACHE // self.values.shape[1])
        for low in range(0, len(first), step):
            some = slice(low, low + step)
            difference = np.subtract(self._rows(first[some]), self._rows(second[some]))
            if self.metric == "max":
                limit = difference.dtype.type(self.threshold)
                found[some] = np.abs(difference, out=difference).max(axis=-1) <= limit
            else:  # sums are rounded as the authors' are
                found[some] = (distance(torch.from_numpy(difference), self.metric) <= self.threshold).numpy()
        return found

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        """(n, P) of some tokens, not copied where they are neighbours."""
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == len(numbers) and (np.diff(numbers) == 1).all():
            return self.values[first : last + 1]
        return np.asarray(self.values[numbers])

    def _equal(self, offsets: Sequence[int], of: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Which tokens equal the ones so many places before them, runs of them at once."""
        same, runs = [], []
        for number, (offset, asked) in enumerate(zip(offsets, of, strict=True)):
            if self.metric != "max" or self.threshold > 0:
                equal = (self.probes[:, offset:] == self.probes[:, : -offset or None]).all(axis=0)
                asked = asked & np.concatenate([np.zeros(len(asked) - len(equal), dtype=bool), equal])
            same.append(asked)
            ends = np.flatnonzero(np.diff(asked, prepend=False, append=False)).reshape(-1, 2)
            runs.append(np.column_stack([ends, np.full(len(ends), offset), np.full(len(ends), number)]))
        if not self.whole:
            self._check(np.concatenate(runs), same)
        return same

    def _check(self, runs: np.ndarray, same: list[np.ndarray]) -> None:
        """Of runs of tokens (first, end, offset, number of the offset), take out those that differ."""
        runs = _cut(runs, _RUN)
        runs = runs[runs[:, 0].argsort(kind="stable")]  # so that what is read again is still in the cache
        singles = _cut(runs[self._differ(runs)], 1)
        singles = singles[self._differ(singles)]
        for low in range(0, len(singles), _RUN):
            first, _, offset, number = singles[low : low + _RUN].T
            equal = (self.values[first] == self.values[first - offset]).all(axis=-1)  # so are zeros of both signs
            for kind in range(len(same)):
                mine = number == kind
                same[kind][first[mine]] = equal[mine]

    def _differ(self, runs: np.ndarray) -> np.ndarray:
        """Numbers of the runs of which the bytes differ from those so many tokens before."""
        first, end, offset, _ = runs.T
        start, size = self.values.ctypes.data, self.values.strides[0]
        at, before, length = start + first * size, start + (first - offset) * size, (end - first) * size
        return np.flatnonzero(list(map(_compare, at.tolist(), before.tolist(), length.tolist())))


def _cut(runs: np.ndarray, most: int) -> np.ndarray:
    """Runs (first, end, ...) as runs of at most so many."""
    first, end = runs[:, 0], runs[:, 1]
    pieces = -(-(end - first) // most)
    cut = np.repeat(runs, pieces, axis=0)
    place = np.arange(len(cut)) - np.repeat(pieces.cumsum() - pieces, pieces)
    cut[:, 0] += place * most
    cut[:, 1] = np.minimum(cut[:, 0] + most, cut[:, 1])
    return cut
