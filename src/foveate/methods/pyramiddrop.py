"""PyramidDrop: prune between stages of the decoder, more the deeper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import Grid, Keep, Method, Selection, Signals, Site
from foveate.methods._stages import check_stages, rounded_down, stage_depths
from foveate.ops.subsets import top_k

LAYERS = (8, 16, 24)
"""The paper's depths in a decoder of 32 blocks."""


@dataclass(frozen=True)
class PyramidDrop(Method):
    """PyramidDrop: keeps ever fewer of the visual tokens that the last prompt token attends to, stage by stage.

    The attention is the one that the next block is about to pay: the last prompt token and the tokens still present
    go through that block's norm and its query and key projections. Mean over heads.

    Args:
        layers: decoder blocks that run before each stage; by default 8, 16 and 24 of 32, scaled to the decoder.
        keep: for each stage tokens per image, or a share of its ORIGINAL tokens, rounded down as in the authors' code,
            at least 1.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17247"
    site: ClassVar[Site] = "layer"
    needs = ("decoder.next_query",)

    layers: tuple[int, ...] | None = None
    keep: tuple[Keep, ...] = (0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        check_stages("PyramidDrop", self.keep, self.layers, LAYERS)

    def depths(self, layers: int) -> tuple[int, ...]:
        return stage_depths("PyramidDrop", self.layers, LAYERS, 32, layers)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return rounded_down(self.keep, original)

    def select(self, signals: Signals) -> Selection:
        assert signals.decoder is not None and signals.decoder.next_query is not None
        scores = signals.decoder.next_query.float().mean(dim=1)
        rows = zip(signals.index, top_k(scores, self.wanted(signals)), strict=True)
        return Selection([row[chosen].sort().values for row, chosen in rows], scores=scores)
