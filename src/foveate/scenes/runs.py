"""What training `mini` keeps: a state that survives a kill at any moment, a log of one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foveate.core import FoveateError
from foveate.runs import append_line, whole_file, write_text

STATE, LOG = "state.safetensors", "log.jsonl"


@dataclass
class Progress:
    """How far a run has come: steps done, pictures seen, seconds of training over all its sittings."""

    step: int = 0
    pictures: int = 0
    seconds: float = 0.0


class Run:
    """State and log in the folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by this one; a kill leaves the old state or the new one, never half of one."""
        header = {"progress": json.dumps(vars(progress))}
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with whole_file(self.folder / STATE) as temporary:
            save_file(whole, temporary, header)

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """The state that `save` wrote last; None for a run that was killed before its first.

        Raises:
            FoveateError: the state is damaged.
        """
        if not (self.folder / STATE).exists():
            return None
        progress = Progress(**json.loads(read_header(self.folder)["progress"]))
        with safe_open(self.folder / STATE, "pt") as file:
            return progress, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        append_line(self.folder / LOG, json.dumps(line))

    def rewind_log(self, step: int) -> None:
        """Drop lines of steps after `step`, which a resumed run does again, and a line that a kill cut short."""
        path = self.folder / LOG
        if not path.exists():
            return
        kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def read_header(folder: Path) -> dict[str, str]:
    """The state's header; FoveateError where the file is no whole safetensors file of a run."""
    try:
        with safe_open(folder / STATE, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FoveateError(f"{folder / STATE} is damaged ({error}); start again in another folder") from error
    if "progress" not in header:
        raise FoveateError(f"{folder / STATE} is no state of a training run; start in another folder")
    return dict(header)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `optimizer/<parameter>/<entry>`."""
    return {
        f"optimizer/{names[parameter]}/{entry}": torch.as_tensor(value)
        for parameter, entries in _states(optimizer)
        for entry, value in entries.items()
    }


def _states(optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    # Keyed by parameter, which the annotations of torch call a tensor.
    return list(optimizer.state.items())  # type: ignore[arg-type]


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, name, entry = key.split("/")
            parameter = parameters[name]
            optimizer.state[parameter][entry] = value if entry == "step" else value.to(parameter.device)
