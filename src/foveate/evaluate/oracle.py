"""The ceiling of a task: keeps the tokens of the objects asked about, from boxes that no method is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from foveate.core import FoveateError, Grid, Method, Selection, Signals, Site

Box: TypeAlias = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of the picture's sides

_SLIVER = 1e-6  # of a patch's side: a box that ends on a border may lie a rounding error beyond it


class Oracle(Method):
    """Oracle: keeps every token whose patch touches one of the boxes given for its picture.

    It is made for one batch of pictures and belongs to no registry: it knows the answer's place.

    Args:
        boxes: B sequences of boxes, in the order of the batch's pictures.
    """

    site: ClassVar[Site] = "input"
    adaptive: ClassVar[bool] = True
    boxes: tuple[tuple[Box, ...], ...]

    def __init__(self, boxes: Sequence[Sequence[Box]]) -> None:
        object.__setattr__(self, "boxes", tuple(tuple(picture) for picture in boxes))

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """None: as many as the boxes cover."""
        return None

    def select(self, signals: Signals) -> Selection:
        batch, _ = signals.shape
        if len(self.boxes) != batch:
            raise FoveateError(f"the ceiling holds boxes of {len(self.boxes)} pictures but was asked about {batch}")
        if signals.grid is None:
            raise FoveateError(
                "the ceiling needs the raster of the picture's tokens, which this model does not give; leave it out"
            )
        grid, device = signals.grid, signals.index.device
        return Selection([covered(picture, grid).nonzero().flatten().to(device) for picture in self.boxes])


def covered(boxes: Sequence[Box], grid: Grid) -> Tensor:
    """(N,) bool: which patches of an (h, w) raster, row by row, one of the boxes touches."""
    height, width = grid
    rows, columns = torch.arange(height), torch.arange(width)
    touched = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        tall = (rows < y1 * height - _SLIVER) & (rows + 1 > y0 * height + _SLIVER)
        wide = (columns < x1 * width - _SLIVER) & (columns + 1 > x0 * width + _SLIVER)
        touched |= tall[:, None] & wide
    return touched.flatten()
