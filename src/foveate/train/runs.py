"""What a training run remembers of itself: the settings it was begun with, and its last complete checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.core import FoveateError
from foveate.runs import make_folder, write_json

SETTINGS, FIGURES = "run.json", "figures.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LAST_WRITTEN = "trainer_state.json"


def begin(folder: Path, settings: Mapping[str, Any], resume: bool, write: bool = True) -> None:
    """Start a run in `folder`, or make sure that it can go on there as if it had never stopped.

    Args:
        settings: whatever must be equal; JSON values.
        write: False in all processes but the first.

    Raises:
        FoveateError: `folder` holds a run and `resume` is False, or it holds none or one with other settings and
            `resume` is True.
    """
    wanted, path = json.loads(json.dumps(settings)), folder / SETTINGS
    if resume:
        _compare(folder, wanted)
    elif path.exists() and write:
        raise FoveateError(f"{folder} already holds a run; resume it, or give another folder")
    elif write:
        make_folder(folder)
        write_json(path, wanted)


def _compare(folder: Path, wanted: dict[str, Any]) -> None:
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except OSError as error:
        raise FoveateError(f"{folder} holds no {SETTINGS} to resume; start a run there without resume") from error
    except ValueError as error:
        raise FoveateError(f"{folder / SETTINGS} is damaged ({error}); start again in another folder") from error
    for name in sorted({*before, *wanted}):
        if before.get(name) != wanted.get(name):
            raise FoveateError(
                f"{folder} was begun with {name}={before.get(name)!r}, not {wanted.get(name)!r}; resume with the same "
                "settings, model and data, or start in another folder"
            )


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
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / FIGURES).write_text(json.dumps(figures) + "\n", encoding="utf-8")


def read_figures(checkpoint: Path) -> dict[str, Any]:
    """What `write_figures` wrote.

    Raises:
        FoveateError: it is not there or damaged.
    """
    try:
        figures: dict[str, Any] = json.loads((checkpoint / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FoveateError(f"{checkpoint / FIGURES} cannot be read ({error}); start again in another folder") from error
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
