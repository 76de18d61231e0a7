"""CDPruner: prune to the set that a determinantal point process conditioned on the question prefers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from foveate.core import Keep, Selection, Signals, Site
from foveate.methods._sets import choose_sets
from foveate.methods._tiles import TileMethod
from foveate.methods._words import WordSpace, check_word_space, question_signals, tokens_and_question
from foveate.ops.greedy import diverse
from foveate.ops.likeness import between_extremes
from foveate.ops.scores import cosines
from foveate.ops.tiles import Pools


@dataclass(frozen=True)
class CDPruner(TileMethod):
    """CDPruner: keeps tokens that differ from each other and match the question, so that relevance does not repeat.

    Greedy choice of the set S with the largest det(L_S), L_ij = r_i * cos_ij * r_j: cosines are those of the projected
    tokens, r the cosine of a token to the question in CLIP's joint space (mean over the pieces of a long question),
    stretched to (0, 1] over the image. Where the budget exceeds the rank of L, r alone decides on the rest; the
    authors' code then repeats tokens.

    The authors' code (`official`) NEGATES the cosine to the question, which the paper's formulas do not show, so that
    what resembles the question least counts as relevant; and it stretches r over the whole batch.

    Args:
        keep: tokens per image, or a share of them, rounded half to even: 64 of 576 by default.
        space: where tokens meet the question: "clip" in CLIP's joint space as in the paper; "decoder" compares the
            projected tokens with the mean embedding of the text after the image, for encoders that are no CLIP.
        relevance: "negated" takes what resembles the question least for relevant.
        budget: with several tiles, "tile" chooses in every tile on its own and shares the budget evenly as the authors
            do, "image" chooses from all at once.
        official: the code's r, whatever `relevance` says.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2506.10967"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.111
    space: WordSpace = "clip"
    relevance: Literal["direct", "negated"] = "direct"
    budget: Literal["tile", "image"] = "tile"
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word_space(self.space, self.official)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("features", *question_signals(self.space))))

    def select(self, signals: Signals) -> Selection:
        features, weight = signals.features, self.relevances(signals).square()
        assert features is not None

        def choose(pools: Pools, count: int) -> Tensor:
            return diverse(pools.take(features), count, pools.take(weight), pools.free)

        return choose_sets(signals, self.wanted(signals), self.budget, choose)

    def relevances(self, signals: Signals) -> Tensor:
        """(B, N), above 0 and at most 1: r."""
        likeness = cosines(*tokens_and_question(signals, self.space, "CDPruner")).mean(dim=-1)
        if self.official or self.relevance == "negated":
            likeness = -likeness
        return between_extremes(likeness, 1e-6, dim=(0, 1) if self.official else -1)
