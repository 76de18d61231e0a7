"""Pool: neighbouring tokens averaged into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import Keep, Method, Selection, Signals, Site, check_keep
from foveate.ops.subsets import cell_centres, lattice


@dataclass(frozen=True)
class Pool(Method):
    """Pool: merges neighbouring tokens by their mean, so that nothing is dropped but detail.

    The grid is cut into as many cells as tokens are kept; keep=0.25 is the mean over 2 x 2 blocks, which FoPru calls
    "w/o Significance" (Table 3). The mean is taken after the projector, where every family has its tokens.

    Args:
        keep: tokens per image, or a share of them, rounded half to even.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.14164"
    site: ClassVar[Site] = "input"
    needs = ("features",)

    keep: Keep = 0.25

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def select(self, signals: Signals) -> Selection:
        assert signals.features is not None
        grid = signals.raster("Pool", "put Pool first, or take uniform")
        kept = self.wanted(signals)
        cell = lattice(*grid, kept)
        centres = cell_centres(cell, grid).to(signals.index.device)
        cell = cell.to(signals.index.device)
        weights = torch.nn.functional.one_hot(cell, kept).T.float()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        pooled = torch.einsum("kn,bnd->bkd", weights, signals.features.float()).to(signals.features.dtype)
        return Selection([row[centres] for row in signals.index], features=list(pooled))
