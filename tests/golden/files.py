"""Golden files as arrays and as signals: reading them, and putting each array where `Signals` has it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from foveate.core import Block, CacheBlock, CacheSelection, Method, Selection, Signals

FOLDER = Path(os.environ.get("FOVEATE_GOLDEN") or Path(__file__).parent)

Arrays: TypeAlias = dict[str, np.ndarray]
Settings: TypeAlias = dict[str, Any]


class Case(NamedTuple):
    """One golden file; `signals` and `expected` have one entry per stage, to be asked in order."""

    name: str
    method: Method
    signals: list[Signals]
    expected: list[Selection | CacheSelection]


Built: TypeAlias = tuple[Method, list[Signals], list[Selection | CacheSelection]]
Builder: TypeAlias = Callable[[Settings, Arrays], Built]


def index_of(folder: str | Path = FOLDER) -> list[dict[str, Any]]:
    """What the folder says about each of its files."""
    entries: list[dict[str, Any]] = json.loads((Path(folder) / "index.json").read_text(encoding="utf-8"))["files"]
    return entries


def arrays_of(folder: str | Path, file: str) -> Arrays:
    """The arrays of one file, by name."""
    with np.load(Path(folder) / file) as stored:
        return {name: stored[name] for name in stored.files}


def stages_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The suffixes of the stages that a file holds: "", "_stage2", ..."""
    later = {"_stage" + name.rpartition("_stage")[2] for name in arrays if "_stage" in name}
    return ["", *sorted(later, key=lambda suffix: int(suffix.removeprefix("_stage")))]


def place(paths: Mapping[str, str], values: Mapping[str, Tensor], index: Tensor, **more: Any) -> Signals:
    """Signals with each array where `paths` says it belongs: "features", "decoder.hidden", "tower.read.hidden"."""
    rooms: dict[str, dict[str, Tensor]] = {"": {}, "decoder": {}, "cache": {}}
    for name, value in values.items():
        room, _, field = paths[name].rpartition(".")
        rooms.setdefault(room, {})[field] = value
    tower: dict[int | str, Block] = {}
    for room, fields in rooms.items():
        if room.startswith("tower."):
            block = room.removeprefix("tower.")
            tower[int(block) if block.isdigit() else block] = Block(**fields)
    cache = more.pop("cache", {})
    return Signals(
        original=more.pop("original", index.shape[1]),
        index=index,
        tower=tower,
        decoder=Block(**rooms["decoder"]) if rooms["decoder"] else None,
        cache=CacheBlock(**rooms["cache"], **cache) if rooms["cache"] else None,
        **rooms[""],
        **more,
    )


def raster(tokens: int, batch: int) -> Tensor:
    return torch.arange(tokens).repeat(batch, 1)
