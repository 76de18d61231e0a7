"""What a training run of the Trainer leaves to go on from: its last complete checkpoint, and what it has added up."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate.checkpoints import fingerprint as fingerprint
from foveate.paths import read_json
from foveate.runs import make_folder, write_json

FIGURES = "figures.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LAST_WRITTEN = "trainer_state.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill may have cut a newer one short."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / _LAST_WRITTEN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def write_figures(checkpoint: Path, figures: Mapping[str, Any]) -> None:
    """Put what a run has added up into a checkpoint that is being written."""
    write_json(make_folder(checkpoint) / FIGURES, figures)


def read_figures(checkpoint: Path) -> dict[str, Any]:
    """What `write_figures` wrote; FoveateError where it cannot be read."""
    figures: dict[str, Any] = read_json(checkpoint / FIGURES, str(checkpoint / FIGURES))
    return figures
