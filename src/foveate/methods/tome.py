"""ToMe: merge similar patches inside the encoder, a few in every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import Selection, Signals
from foveate.forms import Merger
from foveate.ops.merging import bipartite_merge, in_raster_order


@dataclass(frozen=True)
class ToMe(Merger):
    """ToMe: keeps size-weighted means of the patches whose keys are alike, because they say much the same.

    In every encoder block up to the one that the projector reads, between attention and MLP, patches are split by
    turns into two sets; each patch of the first has an edge to the patch of the second whose key (mean over heads) has
    the highest cosine similarity, and the r most similar pairs merge into their size-weighted mean (section 3). CLS
    stands in the first set and never merges. A merged token stands where its member of the second set stood.

    Inside the encoder tokens stand in the order of the authors' code (the rest of the first set, then the second),
    which decides who may merge next; they leave it in raster order. The paper gives r per model, for image
    classification; half of the tokens is this library's default.

    Args:
        keep: tokens per image at the end, or a share of them, rounded half to even; 0.5 unless `r` is given.
        r: in its place, patches that each block merges away (more than half of them counts as half, as in the code), or
            one number per block, the blocks behind them merging none.
        proportional: log(size) is added to a token's attention logits (equation 1).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2210.09461"
    needs = ("tower.latest.hidden", "tower.latest.keys")

    def __post_init__(self) -> None:
        if self.keep is None and self.r is None:
            object.__setattr__(self, "keep", 0.5)
        super().__post_init__()

    def select(self, signals: Signals) -> Selection:
        r, last = self.merges(signals), signals.stage + 1 == signals.stages
        if r == 0:
            rows = [row.sort().values for row in signals.index] if last else list(signals.index)
            return Selection(rows, ordered=last)
        block = signals.tower["latest"]
        assert block.hidden is not None and block.keys is not None and signals.size is not None
        metric = block.keys.float().mean(dim=1)
        merged = bipartite_merge(block.hidden, metric, signals.size, r, behind_cls=block.cls is not None)
        index, features, group = signals.index.gather(1, merged.representative), merged.features, merged.group
        if last:
            index, features, group = in_raster_order(index, features, group)
        return Selection(list(index), list(features), groups=list(group), ordered=last)
