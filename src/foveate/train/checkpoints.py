"""What a training run of the Trainer leaves to go on from: its last complete checkpoint, and what it has added up."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A digest of a module's parameters and buffers, bit by bit, computed where they are.

    Two sums per tensor, one of them weighted by place, tell any change that training makes.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        bits = value.detach().contiguous().flatten()
        bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]).long()
        places = torch.arange(bits.numel(), device=bits.device) % 65_521 + 1
        sums = torch.stack([bits.sum(), (bits * places).sum()]).tolist()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} {sums}\n".encode())
    return digest.hexdigest()
