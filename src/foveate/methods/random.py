"""Random: the baseline that every table needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import FoveateError, Keep, Method, Selection, Signals, Site, check_keep
from foveate.ops.subsets import random_subset


@dataclass(frozen=True)
class Random(Method):
    """Random: keeps tokens drawn uniformly, the floor that any scoring must beat.

    The draw depends on (seed, tokens) alone, so that an image in a batch keeps what it keeps alone.

    Args:
        keep: tokens per image, or a share of them, rounded half to even.
        seed: of the draw, 0 or more.
    """

    site: ClassVar[Site] = "input"

    keep: Keep = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise FoveateError(f"seed={self.seed!r} is no whole number; the smallest is seed=0")
        if self.seed < 0:
            raise FoveateError(f"seed={self.seed} is negative; the smallest is seed=0")

    def select(self, signals: Signals) -> Selection:
        tokens = signals.shape[1]
        kept = self.wanted(signals)
        chosen = random_subset(tokens, kept, self.seed, signals.index.device)
        return Selection([row[chosen].sort().values for row in signals.index])
