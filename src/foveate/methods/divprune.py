"""DivPrune: prune to the set of tokens that lie farthest apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import Keep, Method, Selection, Signals, Site, check_keep
from foveate.ops.greedy import farthest


@dataclass(frozen=True)
class DivPrune(Method):
    """DivPrune: keeps the tokens that are farthest from each other, so that none repeats what another says.

    Greedy max-min diversity under cosine distance of the projected tokens: first the token whose nearest neighbour is
    farthest, then always the one whose nearest kept token is farthest. All tiles of an image compete.

    The authors' code does not exclude what it has taken, so that copies of a token come out again in place of others,
    and a zero token makes it NaN; here every token comes out once and a zero token is at distance 1 from all.

    Args:
        keep: tokens per image, or a share of them, rounded half to even as in the authors' code: 56 of 576 by default.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"
    site: ClassVar[Site] = "input"
    needs = ("features",)

    keep: Keep = 0.098

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def select(self, signals: Signals) -> Selection:
        assert signals.features is not None
        left = signals.shape[1]
        kept = self.wanted(signals)
        index = signals.index if kept == left else signals.index.gather(1, farthest(signals.features, kept))
        return Selection(list(index.sort(dim=-1).values))
