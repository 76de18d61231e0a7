"""SCoRe: prune to the salient tokens that lie far apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from foveate.core import Keep, Selection, Signals, Site
from foveate.methods._attention import Attention, RankingMethod
from foveate.methods._checks import check_power
from foveate.methods._sets import choose_sets, salience
from foveate.ops.greedy import farthest
from foveate.ops.tiles import Pools


@dataclass(frozen=True)
class ScoreCover(RankingMethod):
    """ScoreCover: keeps tokens that CLS attends to and that no kept one resembles, so that salience does not repeat.

    SCoRe, salience-coverage reduction: first the patch of the highest CLS attention a, then always the one of the
    largest d * a ** alpha, where d is the cosine distance to the nearest kept patch. The question is not read.

    No code is public. Open in the paper and read here: attention and patch features are those of the block whose
    output the projector reads, before the projector; the budget is split evenly over tiles.

    Args:
        keep: tokens per image, or a share of them, rounded half to even: 64 of 576 by default.
        alpha: weight of the attention, 0 to 8; 0 keeps the farthest tokens from the most salient one on.
        budget: with several tiles, "tile" shares the budget evenly, "image" lets the tiles compete.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS.
    """

    paper: ClassVar[str] = "https://cvpr.thecvf.com/virtual/2026/poster/39155"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.111
    alpha: float = 0.8
    budget: Literal["tile", "image"] = "tile"
    attention: Attention = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_power("alpha", self.alpha)

    def select(self, signals: Signals) -> Selection:
        block = signals.tower["read"]
        attention, hidden = salience(block, self.attention), block.hidden
        assert hidden is not None

        def choose(pools: Pools, count: int) -> Tensor:
            first = pools.take(attention)
            return farthest(pools.take(hidden), count, first, first.pow(self.alpha), pools.free)

        return choose_sets(signals, self.wanted(signals), self.budget, choose)
