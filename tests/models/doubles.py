"""Methods that exist for tests only: fixed choices, counts that differ between images, and broken answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from foveate.core import Grid, Method, Selection, Signals
from foveate.forms import Scorer


@dataclass(frozen=True)
class Fixed(Method):
    """Fixed: keeps the indices it is told, whatever it sees."""

    kept: tuple[int, ...] = (0,)
    ordered: bool = True

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return (len(self.kept),)

    def select(self, signals: Signals) -> Selection:
        kept = torch.tensor(self.kept)
        return Selection([kept for _ in range(signals.shape[0])], ordered=self.ordered)


@dataclass(frozen=True)
class Ragged(Method):
    """Ragged: keeps another number of tokens of each image, those with the largest features."""

    adaptive: ClassVar[bool] = True
    needs = ("features",)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None

    def select(self, signals: Signals) -> Selection:
        assert signals.features is not None
        kept = []
        for row, index in zip(signals.features.double(), signals.index, strict=True):
            number = 2 + int(row.sum().abs() * 10) % 11
            kept.append(index[row.norm(dim=-1).topk(number).indices.sort().values])
        return Selection(kept)


@dataclass(frozen=True)
class Scored(Scorer):
    """Scored: scores that a test gives."""

    scores: Callable[[Signals], Any] | None = None

    def score(self, signals: Signals) -> Any:
        assert self.scores is not None
        return self.scores(signals)


@dataclass(frozen=True)
class Answer(Method):
    """Answer: hands on whatever a test returns."""

    adaptive: ClassVar[bool] = True

    answer: Callable[[Signals], Selection] | None = None
    wants: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return self.wants

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None

    def select(self, signals: Signals) -> Selection:
        assert self.answer is not None
        return self.answer(signals)
