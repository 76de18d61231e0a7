"""What a stored array is compared with: one stage of a golden case, and the comparisons that its checks are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from golden.files import Case

from foveate.core import Signals

CLOSE = dict(rtol=1e-4, atol=1e-5)
"""How floating-point arrays compare, as the index recommends."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One stage of a case with everything that a check may look at."""

    case: Case
    stage: int
    signals: Signals
    got: Any
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]
    suffix: str

    @property
    def indices(self) -> np.ndarray:
        """(B, K)."""
        return torch.stack(list(self.got.indices)).numpy()


Check: TypeAlias = Callable[[Seen, np.ndarray], None]


def scores_are(score: Callable[[Seen], Any]) -> Callable[[Seen, np.ndarray], None]:
    def check(seen: Seen, stored: np.ndarray) -> None:
        np.testing.assert_allclose(np.asarray(score(seen)), stored, **CLOSE)

    return check


def equal_to(answer: Callable[[Seen], Any]) -> Callable[[Seen, np.ndarray], None]:
    def check(seen: Seen, stored: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(answer(seen)), stored)

    return check


def same_set_as(answer: Callable[[Seen], Any]) -> Callable[[Seen, np.ndarray], None]:
    """For arrays in the order of the cited code's top-k, whose neighbours rounding may swap."""

    def check(seen: Seen, stored: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(answer(seen)), np.sort(stored, axis=-1))

    return check
