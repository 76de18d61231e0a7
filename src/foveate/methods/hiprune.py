"""HiPrune: prune by the attention that patches receive in a middle and in the last block of the encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import FoveateError, Grid, Keep, Method, Selection, Signals, Site, check_keep
from foveate.methods._checks import check_share
from foveate.methods._tiles import choose_by_tile
from foveate.ops.subsets import descending, grid_neighbours, with_neighbours


@dataclass(frozen=True)
class HiPrune(Method):
    """HiPrune: keeps the few patches that stand out in the middle of the encoder, their neighbours, and late summaries.

    The score of a token in a block is the attention it receives, mean over heads and over all queries, CLS included.
    The round(K * alpha / 5) tokens that score highest in a middle block, where objects show, are anchors; they and
    their neighbours to the left, to the right, above and below stay. The rest of the budget goes to the tokens that
    score highest in the block whose output the projector reads, where single tokens sum up the picture. Where anchors
    and neighbours are more than the budget, anchors come first, then neighbours by their later score. With the paper's
    alpha there are no anchors in a budget below 26.

    The neighbours need the raster, so that no earlier stage may have taken tokens. With several tiles each is pruned to
    its even share, as the authors do it, and must be a complete square.

    Args:
        keep: tokens per image, or a share of them, rounded half to even. The default makes 192 of 576.
        alpha: share of the budget for anchors and neighbours, 0 to 1.
        block: encoder block (0-based) in which objects show. None: the paper's, block 8 of 24, in proportion.
        official: as the authors' code has it, the neighbours are the tokens one and one row before and after in raster
            order, clamped to the raster, so that rows run on into each other.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2508.00553"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.333
    alpha: float = 0.1
    block: int | None = None
    official: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_share("alpha", self.alpha, 0.1)
        if self.block is not None and (type(self.block) is not int or self.block < 0):
            raise FoveateError(
                f"block={self.block!r} is no encoder block; the first is block=0, the paper's block=None"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"tower.{self._block()}.received_all", "tower.read.received_all")

    def _block(self) -> int | str:
        return "8/24" if self.block is None else self.block

    def select(self, signals: Signals) -> Selection:
        objects, deep = signals.tower[self._block()].received_all, signals.tower["read"].received_all
        assert objects is not None and deep is not None

        def choose(images: Tensor, positions: Tensor, count: int) -> Tensor:
            grid = self._raster(signals, positions.shape[1])
            rows = images[:, None]
            raster = signals.index[rows, positions].argsort(dim=1)
            places = positions.gather(1, raster)
            return raster.gather(1, self.chosen(objects[rows, places], deep[rows, places], grid, count))

        kept = self.wanted(signals)
        return choose_by_tile(signals, kept, "tile", choose)

    def chosen(self, objects: Tensor, deep: Tensor, grid: Grid, count: int) -> Tensor:
        """(B, N) scores of both blocks in raster order -> (B, count) positions: anchors, neighbours, then the rest."""
        anchors = descending(objects)[:, : round(count * self.alpha / 5)]
        around = with_neighbours(anchors, grid_neighbours(grid, self.official, objects.device))
        tier = around.to(torch.float32).scatter(1, anchors, 2.0)
        by_deep = descending(deep)
        by_tier = tier.gather(1, by_deep).sort(dim=1, descending=True, stable=True).indices
        return by_deep.gather(1, by_tier)[:, :count]

    def _raster(self, signals: Signals, tokens: int) -> Grid:
        """Height and width of one tile, or of an image without tiles."""
        whole, tile = signals.shape[1] == signals.original, signals.tile
        if whole and signals.grid is not None and math.prod(signals.grid) == tokens == signals.shape[1]:
            return signals.grid
        side = math.isqrt(tokens)
        # Un-padding trims tiles at the border but never the base: tiles as large as it are complete.
        if whole and tile is not None and side * side == tokens == signals.by_tile()[0][0]:
            return side, side
        raise FoveateError(
            "HiPrune needs the whole grid of the image to know which tokens are neighbours, but "
            + ("an earlier stage has taken tokens from it" if not whole else f"{tokens} of its tokens form no raster")
            + "; put HiPrune first, or use a method that needs no grid"
        )
