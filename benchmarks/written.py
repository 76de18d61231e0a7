"""What a file of figures says of itself: when, on which machine, beside which load, and by which command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from foveate.runs import write_text

PLACES = {"--out", "--models", "--kvpress", "--openvino"}  # options that name a place of this machine


def command() -> str:
    """The command line, without places."""
    script = Path(sys.argv[0])
    words, given = [f"{script.parent.name}/{script.name}"], iter(sys.argv[1:])
    for word in given:
        option, is_whole, _ = word.partition("=")
        if option not in PLACES:
            words.append(word)
        elif not is_whole:
            next(given)
    return shlex.join(["python", *words])


def write_figures(path: Path | None, load: float, **found: Any) -> None:
    """Write figures, and what they were measured on, where there is a path.

    Args:
        load: of the machine when the measuring began.
        found: the figures by name, and what else is to be said.
    """
    if path is None:
        return
    cores = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"cpu": platform.processor() or platform.machine(), **cores},
        "load": [load, os.getloadavg()[0]],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": command(),
        **found,
    }
    write_text(path, json.dumps(result, indent=1) + "\n")
