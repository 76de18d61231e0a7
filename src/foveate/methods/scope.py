"""SCOPE: prune to salient tokens that cover the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from foveate.core import Keep, Selection, Signals, Site
from foveate.methods._attention import Attention, RankingMethod
from foveate.methods._checks import check_power
from foveate.methods._sets import choose_sets, salience
from foveate.ops.greedy import covering
from foveate.ops.scores import cosines
from foveate.ops.tiles import Pools


@dataclass(frozen=True)
class SCOPE(RankingMethod):
    """SCOPE: keeps tokens that CLS attends to and that resemble many others, so that the kept ones cover the picture.

    Each pick has the largest gain in coverage times a ** alpha: the gain is the rise, summed over all patches, of the
    cosine to the most similar kept patch (0 at first), a the CLS attention. Cosines are those of the patches before
    the projector; the question is not read.

    Args:
        keep: tokens per image, or a share of them, rounded half to even: 64 of 576 by default.
        alpha: weight of the attention, 0 to 8; 0 is coverage alone.
        budget: with several tiles, "tile" covers every tile on its own and shares the budget evenly (the authors' code
            rounds down per tile; the total is exact here), "image" covers all at once.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.111
    alpha: float = 1.0
    budget: Literal["tile", "image"] = "tile"
    attention: Attention = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_power("alpha", self.alpha)

    def select(self, signals: Signals) -> Selection:
        block = signals.tower["read"]
        weight, hidden = salience(block, self.attention).pow(self.alpha), block.hidden
        assert hidden is not None

        def choose(pools: Pools, count: int) -> Tensor:
            patches, weights = pools.take(hidden), pools.take(weight)
            everyone = pools.without_padding(weights.new_ones(weights.shape))
            return covering(cosines(patches, patches), count, everyone, weights, pools.free)

        return choose_sets(signals, self.wanted(signals), self.budget, choose)
