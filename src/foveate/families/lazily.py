"""Layout functions by their names, found when they are called: they work with torch, which costs, reading rows, do not.

Each takes what its namesake takes and gives one Layout a picture; see the rooms beside.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.families.layouts import Layout

_ROOMS = {
    "layouts": ("plain", "square", "tiled_runs"),
    "anyres": ("anyres",),
    "frames": ("halved_frames", "pooled_frames", "whole_frames"),
    "packed": ("packed_blocks", "packed_patches", "packed_rasters", "padded_rasters"),
}


def _later(room: str, name: str) -> Callable[..., list[Layout]]:
    def lay(*arguments: Any) -> list[Layout]:
        found: list[Layout] = getattr(import_module(f"foveate.families.{room}"), name)(*arguments)
        return found

    return lay


_FOUND = {name: _later(room, name) for room, names in _ROOMS.items() for name in names}
plain, square, tiled_runs = (_FOUND[name] for name in _ROOMS["layouts"])
anyres = _FOUND["anyres"]
halved_frames, pooled_frames, whole_frames = (_FOUND[name] for name in _ROOMS["frames"])
packed_blocks, packed_patches, packed_rasters, padded_rasters = (_FOUND[name] for name in _ROOMS["packed"])
