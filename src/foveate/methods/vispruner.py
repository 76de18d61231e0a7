"""VisPruner: prune by the attention of the encoder's CLS token, then by likeness among the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.core import Keep, Selection, Signals, Site
from foveate.methods._attention import Attention, RankingMethod, attended
from foveate.methods._checks import check_share
from foveate.methods._tiles import choose_by_tile
from foveate.ops.scores import cosines
from foveate.ops.subsets import descending, without_duplicates


@dataclass(frozen=True)
class VisPruner(RankingMethod):
    """VisPruner: keeps the patches that CLS attends to most, and of the rest those that no other one resembles.

    Tokens are listed by the attention of the CLS query, averaged over heads, in the block whose output the projector
    reads. The first int(K * ratio) of them stay. From the others, round by round, the even places of the list are set
    against the odd ones, and the 8 even ones that are most like an odd one (cosine of the encoder's tokens) leave; the
    surviving even ones by falling likeness, then the odd ones make the next list. The last round drops as many as are
    still too many. Nothing is merged; the kept tokens go on in raster order.

    The authors' code fails on lists of odd length and on budgets below about ten tokens; here every budget is met. A
    budget with a ratio above 0 has at least one token of the first kind, so that keep=1 is the token that CLS attends
    to most.

    Args:
        keep: tokens per image, or a share of them, rounded half to even. The default makes 192 of 576.
        ratio: share of the kept tokens that the attention alone decides, 0 to 1.
        budget: with several tiles, "tile" prunes each to its even share (as the authors do), "image" all at once.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.333
    ratio: float = 0.5
    budget: Literal["tile", "image"] = "tile"
    attention: Attention = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("ratio", self.ratio, 0.5)

    def select(self, signals: Signals) -> Selection:
        block = signals.tower["read"]
        assert block.hidden is not None
        attention, hidden = attended(block, self.attention), block.hidden

        def choose(images: Tensor, positions: Tensor, count: int) -> Tensor:
            rows = images[:, None]
            return torch.cat(self.chosen(attention[rows, positions], hidden[rows, positions], count), dim=1)

        kept = self.wanted(signals)
        return choose_by_tile(signals, kept, self.budget, choose)

    def chosen(self, attention: Tensor, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(B, N), (B, N, E) -> positions of the important and of the diverse tokens, `count` in all, as listed."""
        important = max(int(count * self.ratio), 1 if self.ratio else 0)
        order = descending(attention)
        rest = order[:, important:]
        if important == count or rest.shape[1] == count - important:
            return order[:, :important], rest[:, : count - important]
        return order[:, :important], without_duplicates(cosines(hidden, hidden), rest, count - important)
