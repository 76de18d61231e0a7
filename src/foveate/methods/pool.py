"""Pool: neighbouring tokens averaged into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import Keep, Method, Selection, Signals, Site, check_choices, check_keep
from foveate.methods._merged import Space, merged_signal, merged_tokens
from foveate.ops.device import on_device
from foveate.ops.subsets import even_places, lattice


@dataclass(frozen=True)
class Pool(Method):
    """Pool: merges neighbouring tokens by their mean, so that nothing is dropped but detail.

    The grid is cut into as many cells as tokens are kept; keep=0.25 is the mean over 2 x 2 blocks. The mean is taken
    after the projector, where every family has its tokens; FoPru's "w/o Significance" (Table 3) takes it before.

    Args:
        keep: tokens per image, or a share of them, rounded half to even.
        space: "projected" averages tokens behind the projector; "encoded" those of the encoder, which are projected
            then, as in FoPru's ablation.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.14164"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.25
    space: Space = "projected"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choices(self)
        # The class speaks for the default.
        object.__setattr__(self, "encoded", self.space == "encoded")

    @property
    def needs(self) -> tuple[str, ...]:
        return (merged_signal(self.space),)

    def select(self, signals: Signals) -> Selection:
        tokens = merged_tokens(signals, self.space)
        grid = signals.raster("Pool", "put Pool first, or take uniform")
        kept = self.wanted(signals)
        cell = lattice(*grid, kept)
        centres = on_device(even_places(*grid, kept), signals.index.device)
        weights = torch.nn.functional.one_hot(cell, kept).T.float()
        weights = on_device(weights / weights.sum(dim=-1, keepdim=True), tokens.device)
        pooled = torch.einsum("kn,bnd->bkd", weights, tokens.float()).to(tokens.dtype)
        return Selection([row[centres] for row in signals.index], features=list(pooled), space=self.space)
