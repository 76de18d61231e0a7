"""Uniform: the picture at a lower resolution, by sub-sampling its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import Keep, Method, Selection, Signals, Site, check_keep
from foveate.ops.device import on_device
from foveate.ops.subsets import even_places


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
        tokens, kept = signals.shape[1], self.wanted(signals)
        if signals.grid is not None:
            chosen = even_places(*signals.grid, kept)
        else:
            chosen = ((torch.arange(kept) * 2 + 1) * tokens).div(2 * kept, rounding_mode="floor")
        chosen = on_device(chosen, signals.index.device)
        return Selection([row[chosen].sort().values for row in signals.index])
