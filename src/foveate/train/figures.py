"""What training says of itself over all its sittings: means since the last line of the log and of the run, seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.scenes.means import Means

Reduce = Callable[[Tensor], Tensor]
"""The mean of a tensor over all processes."""


class Figures:
    """What is logged, and what a resumed run must have to log the same as one that was never interrupted."""

    def __init__(self) -> None:
        self._line, self._run = Means(), Means()
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of all sittings, up to the checkpoint that each of them ended with."""
        return time.monotonic() - self._begin

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Those of one part of a step: `loss`, and what else is told of it."""
        self._line.add(figures)
        self._run.add({"loss": figures["loss"]})

    def line(self, reduce: Reduce) -> dict[str, float]:
        """The means since the last call; nothing where no step has been made."""
        means = self._line.current()
        self._line.clear()
        return dict(zip(means, reduce(torch.stack(list(means.values()))).tolist(), strict=True)) if means else {}

    def run(self, reduce: Reduce, steps: int, batch: int) -> dict[str, float]:
        """Of the whole run, by the names that the Trainer has for those of one sitting.

        Args:
            steps: made since the run began.
            batch: rows of each.
        """
        seconds = self.seconds
        told = {"train_runtime": round(seconds, 4), "train_steps_per_second": round(steps / seconds, 3)}
        told["train_samples_per_second"] = round(steps * batch / seconds, 3)
        return told | {f"train_{name}": reduce(mean).item() for name, mean in self._run.current().items()}

    def state(self, reduce: Reduce) -> dict[str, Any]:
        """JSON values from which `restore` goes on; of several processes, the means of their sums."""
        return {"seconds": self.seconds, "line": _reduced(self._line, reduce), "run": _reduced(self._run, reduce)}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state` gave."""
        self._begin = time.monotonic() - state["seconds"]
        self._line.restore(state["line"], device)
        self._run.restore(state["run"], device)


def _reduced(means: Means, reduce: Reduce) -> dict[str, tuple[float, int]]:
    state = means.state()
    sums = reduce(torch.tensor([total for total, _ in state.values()], dtype=torch.float32)).tolist() if state else []
    return {name: (total, count) for (name, (_, count)), total in zip(state.items(), sums, strict=True)}
