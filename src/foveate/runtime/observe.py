"""Reads an encoder's signals once, outside any pruning: what its blocks show of some pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from foveate.core import Block, FoveateError
from foveate.families import family_of
from foveate.runtime.probe import Probe, missing_signals


def observe(model: Any, pixels: Tensor, needs: Iterable[str]) -> dict[int | str, Block]:
    """Encode pictures and return what the named encoder blocks showed; the model is as it was.

    Args:
        model: a loaded vision-language model.
        pixels: (B, C, height, width), moved to the model's device and dtype.
        needs: signals, such as "tower.0.received" or "tower.read.hidden"; those of other rooms are left out.

    Returns:
        Blocks by 0-based number, and by name where one was asked for ("read", "last").

    Raises:
        FoveateError: the model is of no known family, is being pruned, or its encoder lacks a block or a signal.
    """
    needs = tuple(needs)
    family = family_of(model)
    tower = family.tower_of(model)[1]
    missing = missing_signals(needs, tower)
    if missing:
        raise FoveateError(f"{', '.join(missing)} cannot be read: {family.name} with {tower.type} does not have it")
    if getattr(model, "_foveate_handle", None) is not None:
        raise FoveateError("this model is being pruned, so its encoder cannot be observed; stop() the handle first")
    probe = Probe(model, family, needs)
    probe.install()
    try:
        with torch.no_grad():
            model.base_model.get_image_features(pixels.to(model.device, model.dtype))
        return probe.take()
    finally:
        probe.remove()
