"""How many rows a process takes at once, and whether blocks are recomputed, so that a step fits one card of 80 GB.

By arithmetic, not by the machine: a step's noise depends on how it is divided, and a run must go on anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.core import FoveateError
from foveate.cost.devices import HARDWARE
from foveate.cost.training import TrainingMemory, training_memory
from foveate.families import family_of
from foveate.runtime.support import shape_of
from foveate.train.conversations import Extent
from foveate.train.softened import can_recompute

CARD = HARDWARE["a100-80gb"].memory
SPARE = 0.1
"""Share of the card that is left to what no arithmetic knows: fragments, libraries, the encoder at work."""

FEW = 4
"""With fewer rows at once a card waits, so that recomputing blocks to hold more of them is the smaller loss."""


@dataclass(frozen=True)
class Division:
    """How a step is divided.

    Attributes:
        micro: rows that a process takes at once.
        parts: of its share of a step.
        checkpointing: blocks are recomputed in the backward pass.
        extent: the longest row that was reckoned with.
    """

    micro: int
    parts: int
    checkpointing: bool
    memory: TrainingMemory
    extent: Extent

    def __str__(self) -> str:
        need, card = self.memory.total(self.micro) / 1e9, CARD / 1e9
        how = "recomputed" if self.checkpointing else "kept"
        told = (
            f"{self.micro} rows at once, {self.parts} times a step, blocks {how}: {need:.3g} GB by arithmetic for rows "
            f"of {self.extent.visual} visual tokens and {self.extent.text} others"
        )
        return told if need <= card else f"{told}, more than a card of {card:.0f} GB"


def divide(
    base: Any,
    extent: Extent,
    layers: Sequence[int],
    *,
    batch: int,
    processes: int,
    micro: int | None,
    checkpointing: bool | None,
    bf16: bool,
) -> Division:
    """How to divide a step of `batch` rows over processes, one on each card.

    Args:
        extent: the longest row to be expected.
        layers: decoder blocks that run before each module.
        micro, checkpointing: what is fixed; None is what fits: as many rows as do, blocks kept where that still is
            `FEW` rows or all.
        bf16: modules compute in bfloat16.

    Raises:
        FoveateError: `batch` cannot be split like this.
    """
    share, left = divmod(batch, processes)
    if left or share % (micro or 1):
        rows = micro or 1
        nearest = max(1, round(batch / (rows * processes))) * rows * processes
        raise FoveateError(
            f"batch={batch} cannot be split over {processes} processes of {rows} rows at once; nearest: batch={nearest}"
        )
    stored = base.dtype.itemsize

    def reckoned(recomputed: bool) -> Division:
        memory = training_memory(
            shape_of(base, family_of(base)),
            layers=layers,
            visual=extent.visual,
            text=extent.text,
            stored=stored,
            computed=2 if bf16 else stored,
            learned=2 if bf16 else 4,
            checkpointing=recomputed,
        )
        fits = memory.rows(CARD * (1 - SPARE))
        rows = micro or max(one for one in range(1, share + 1) if share % one == 0 and one <= max(1, fits))
        return Division(rows, share // rows, recomputed, memory, extent)

    if checkpointing is not None:
        return reckoned(checkpointing)
    kept = reckoned(False)
    enough = kept.memory.total(kept.micro) <= CARD * (1 - SPARE) and (micro or kept.micro >= min(FEW, share))
    return kept if enough or not can_recompute(base) else reckoned(True)
