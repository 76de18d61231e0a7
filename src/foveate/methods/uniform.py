"""Uniform: the picture at a lower resolution, by sub-sampling its grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import Grid, Keep, Method, Selection, Signals, Site, check_keep
from foveate.ops.device import on_device
from foveate.ops.subsets import cell_centres, lattice


@dataclass(frozen=True)
class Uniform(Method):
    """Uniform: keeps an even lattice of the grid, so that every part of the picture is seen equally.

    The grid is cut into as many cells as tokens are kept and the middle token of each cell stays; tokens that have
    lost their grid are spaced evenly by index.

    Args:
        keep: tokens per image, or a share of them, rounded half to even.
    """

    site: ClassVar[Site] = "input"

    keep: Keep = 0.25

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def select(self, signals: Signals) -> Selection:
        chosen = on_device(_even(signals.shape[1], signals.grid, self.wanted(signals)), signals.index.device)
        return Selection([row[chosen].sort().values for row in signals.index])


@lru_cache(maxsize=32)
def _even(tokens: int, grid: Grid | None, kept: int) -> Tensor:
    """(K,) positions spread evenly over the grid, or over the tokens one behind the other."""
    if grid is not None:
        return cell_centres(lattice(*grid, kept), grid)
    return ((torch.arange(kept) * 2 + 1) * tokens).div(2 * kept, rounding_mode="floor")
