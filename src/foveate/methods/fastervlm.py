"""FasterVLM: prune by the attention of the encoder's CLS token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from foveate.core import Keep, Selection, Signals, Site, check_choices
from foveate.forms import Scorer
from foveate.methods._attention import Attention, attended, attention_signal
from foveate.ops.subsets import top_k_by_tile


@dataclass(frozen=True)
class FasterVLM(Scorer):
    """FasterVLM: keeps the patches that the encoder's CLS token attends to most, before the question is read.

    The score of a token is the probability that the CLS query gives it in the block whose output the projector reads,
    averaged over heads; the kept tokens go on in raster order. Paper and authors' code agree. The paper is the first
    version of the one that later presents VisPruner.

    Args:
        keep: tokens per image, or a share of them, rounded half to even: 25, 10 and 5 % make 144, 58 and 29 of 576.
        budget: with several tiles, "tile" shares the budget evenly (the authors prune every tile to the same count),
            "image" lets the tiles compete.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.25
    budget: Literal["tile", "image"] = "tile"
    attention: Attention = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return (attention_signal(self.attention),)

    def score(self, signals: Signals) -> Tensor:
        return attended(signals.tower["read"], self.attention)

    def select(self, signals: Signals) -> Selection:
        if signals.tile is None or self.budget == "image":
            return super().select(signals)
        scores = self.score(signals)
        kept = top_k_by_tile(scores, signals.tile, signals.by_tile(), self.wanted(signals))
        rows = zip(signals.index, kept, strict=True)
        return Selection([index[row].sort().values for index, row in rows], scores=scores)
