"""Means of what the steps of a training run say, between two lines of its log; what is added up is saved with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Means:
    """Adds up named figures, each counted by itself, since not every step says the same."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """One step's figures, scalars; none of them is waited for."""
        for name, value in figures.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def __bool__(self) -> bool:
        return bool(self._sums)

    def current(self) -> dict[str, Tensor]:
        """The mean of each figure so far."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def clear(self) -> None:
        """Begin anew."""
        self._sums, self._counts = {}, {}

    def state(self) -> dict[str, tuple[float, int]]:
        """Of each figure, its sum and how many were added; plain numbers, from which `restore` goes on bit by bit."""
        return {name: (total.item(), self._counts[name]) for name, total in self._sums.items()}

    def restore(self, state: Mapping[str, Sequence[float]], device: torch.device | str = "cpu") -> None:
        """Go on from what `state` gave."""
        self._sums = {name: torch.tensor(float(total), device=device) for name, (total, _) in state.items()}
        self._counts = {name: int(count) for name, (_, count) in state.items()}
