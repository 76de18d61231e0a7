"""Depths: behind which decoder blocks the stages of a method act."""

from __future__ import annotations

from itertools import pairwise

from foveate.core import FoveateError


def scaled_layers(stages: tuple[int, ...], of: int, layers: int) -> tuple[int, ...]:
    """A paper's pruning depths, given for a decoder of `of` blocks, on one of `layers`: round(layers * k / of).

    At least 1 and strictly rising.

    Raises:
        FoveateError: the decoder has too few blocks for so many stages.
    """
    if layers <= len(stages):
        raise FoveateError(f"{len(stages)} stages need a decoder of at least {len(stages) + 1} blocks, not {layers}")
    depths: list[int] = []
    for place, stage in enumerate(stages):
        lowest = depths[-1] + 1 if depths else 1
        highest = layers - (len(stages) - place)
        depths.append(min(highest, max(lowest, round(layers * stage / of))))
    return tuple(depths)


def check_depths(depths: tuple[int, ...], layers: int, method: str) -> None:
    """Refuse depths outside 1..layers-1 or not strictly rising."""
    for depth in depths:
        if not 1 <= depth < layers:
            raise FoveateError(f"{method}: layer={depth} is outside 1..{layers - 1} of a decoder of {layers} blocks")
    if any(later <= earlier for earlier, later in pairwise(depths)):
        raise FoveateError(f"{method}: layers {depths} do not rise strictly; nearest: {tuple(sorted(set(depths)))}")
