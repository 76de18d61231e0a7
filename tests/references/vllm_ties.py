"""What the reference for the plug-in answers where two tokens tie but for rounding, from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


@lru_cache
def near(spec: str, number: int) -> list[dict[str, Any]]:
    """What the reference answers when rounding falls otherwise."""
    script = str(TESTS / "references" / "vllm_answers.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, folder, "near", spec, str(number)]
        subprocess.run(command, env=environment, check=True)
        made: list[dict[str, Any]] = json.loads((Path(folder) / "near.json").read_text())
        return made
