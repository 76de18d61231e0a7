"""A method whose choices training can be told as well: the numbers of a picture's tokens decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.core import Grid, Method, Selection, Signals, Site

LAYERS = (1, 2, 3)
TOLERANCE = 1e-4


def stays(index: Tensor, stage: int) -> Tensor:
    """Of the tokens of a picture, every second, then every fourth, then every eighth."""
    return index % 2 ** (stage + 1) == 0


@dataclass(frozen=True)
class Halving(Method):
    """Halving: keeps every second token after the first block, and every second of those after each of two others."""

    site: ClassVar[Site] = "layer"

    def depths(self, layers: int) -> tuple[int, ...]:
        return LAYERS

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return tuple(-(-original // 2 ** (stage + 1)) for stage in range(3))

    def select(self, signals: Signals) -> Selection:
        return Selection([row[stays(row, signals.stage)] for row in signals.index])
