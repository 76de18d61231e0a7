"""FoPru: prune by the attention that the vision encoder itself pays to each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.core import (
    FoveateError,
    Grid,
    Keep,
    Method,
    Selection,
    Signals,
    Site,
    check_choices,
    check_keep,
    tokens_to_keep,
)
from foveate.ops.scores import less_dispersed, more_dispersed
from foveate.ops.subsets import best_of_tiles, descending, split_budget


@dataclass(frozen=True)
class FoPru(Method):
    """FoPru: keeps the tokens that the encoder's penultimate block attends to most, one by one or in whole rows.

    Significance is the attention received or given by each patch, whichever varies more over the picture
    (equations 2 to 4); `rank` keeps the tokens of highest significance, `row` the grid rows of highest summed
    significance; the kept tokens go on in raster order.

    Args:
        keep: tokens per image, or a share of them. Rounding: round(N * keep) tokens for `rank`,
            max(1, round(rows * keep)) whole rows for `row`; the paper states ratios only. Of an image with tiles a
            share is rounded once, not in every tile.
        strategy: "rank" (global) or "row" (local, continuous).
        direction: "high" takes the vector of larger variance, "low" the other (ablation "w/o Variance", Table 3).
        reorder: False hands the tokens on in order of significance (ablation "w/o Reordering", Table 3).
        budget: with several tiles, "tile" shares the budget evenly, the remainder to the base (the paper's ratios are
            per 576-token tile), "image" lets the tiles compete.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.14164"
    site: ClassVar[Site] = "input"
    needs = ("tower.read.received", "tower.read.given")

    keep: Keep = 0.25
    strategy: Literal["rank", "row"] = "rank"
    direction: Literal["high", "low"] = "high"
    reorder: bool = True
    budget: Literal["tile", "image"] = "tile"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choices(self)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """One stage. `row` needs the grid; a square one is assumed where none is given."""
        if self.strategy == "row":
            height, width = grid or _square(original)
            return (self._rows(height, width) * width,)
        return (tokens_to_keep(self.keep, original),)

    def select(self, signals: Signals) -> Selection:
        block = signals.tower["read"]
        assert block.received is not None and block.given is not None
        choose = more_dispersed if self.direction == "high" else less_dispersed
        significance = choose(block.given, block.received)
        if self.strategy == "row":
            kept = self._best_rows(significance, signals)
        else:
            kept = self._best_tokens(significance, signals)
        indices = [row[positions] for row, positions in zip(signals.index, kept, strict=True)]
        if self.reorder:
            indices = [index.sort().values for index in indices]
        return Selection(indices, ordered=self.reorder, scores=significance)

    def _best_tokens(self, significance: Tensor, signals: Signals) -> list[Tensor]:
        order = descending(significance)
        if signals.tile is None or self.budget == "image":
            return list(order[:, : self.wanted(signals)])
        total = self.wanted(signals)
        rows = zip(order, signals.tile, signals.by_tile(), strict=True)
        return [best_of_tiles(row, tile, sizes, split_budget(total, sizes)) for row, tile, sizes in rows]

    def _best_rows(self, significance: Tensor, signals: Signals) -> list[Tensor]:
        height, width = signals.raster("FoPru strategy='row'", "put FoPru first or use strategy='rank'")
        rows = descending(significance.unflatten(-1, (height, width)).sum(dim=-1))
        rows = rows[:, : self._rows(height, width)]
        columns = torch.arange(width, device=rows.device)
        return list((rows[..., None] * width + columns).flatten(1))

    def _rows(self, height: int, width: int) -> int:
        if isinstance(self.keep, float):
            return max(1, round(height * self.keep))
        rows, rest = divmod(self.keep, width)
        if rest or not 1 <= rows <= height:
            below, above = max(1, min(height, rows)) * width, min(height, rows + 1) * width
            nearest = f"nearest is keep={below}" if below == above else f"nearest are keep={below} and keep={above}"
            raise FoveateError(
                f"FoPru strategy='row' keeps 1 to {height} whole rows of {width} tokens, but keep={self.keep}; the "
                f"{nearest}"
            )
        return rows


def _square(tokens: int) -> Grid:
    side = round(tokens**0.5)
    if side * side != tokens:
        raise FoveateError(
            f"FoPru strategy='row' needs the grid of the image; {tokens} tokens are no square, so pass grid=(h, w)"
        )
    return side, side
