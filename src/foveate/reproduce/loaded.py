"""Loads one of a table's models, with the adapter that a row of it was tuned to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.inference.adapters import load_tuned
from foveate.reproduce.asked import Asked

if TYPE_CHECKING:
    from foveate.inference.loading import Loaded


def load_for(asked: Asked, name: str) -> Loaded:
    """A model of the papers, from where the user says or from the hub.

    Raises:
        FoveateError: as `load` and `attach`.
    """
    return load_tuned(asked.source(name), asked.adapter(name), **asked.place)
