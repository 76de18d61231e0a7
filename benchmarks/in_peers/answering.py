"""How a peer in an environment of its own is measured: commands come in as lines of JSON, figures go out.

This file and those beside it are run by the peers' own Python, which has no Foveate.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Clocks = tuple[float, float]


def clocks() -> Clocks:
    """Milliseconds by the clock, and of the process's own work."""
    return time.perf_counter() * 1e3, time.process_time() * 1e3


class Ticks:
    """A streamer of transformers that notes both clocks at each token, from its making on."""

    def __init__(self) -> None:
        self.start, self.times = clocks(), list[Clocks]()

    def note(self) -> None:
        """A token is there."""
        self.times.append(clocks())

    def put(self, value: Any) -> None:
        """Note a token; the prompt comes first and does not count."""
        if value.ndim == 1:
            self.note()

    def end(self) -> None:
        """Nothing is held back."""

    def figures(self) -> dict[str, float]:
        """Milliseconds to the first token and for each further one, by the clock and of the process's own work."""
        found = {}
        for place, kind in enumerate(("clock", "process")):
            times = [one[place] for one in self.times]
            found[f"first, {kind}"] = times[0] - self.start[place]
            gaps = [after - before for before, after in pairwise(times)]
            found[f"token, {kind}"] = statistics.median(gaps)
        return found


def answer_commands(made: Callable[[dict[str, Any]], dict[str, Callable[..., Any]]]) -> None:
    """Answer until nothing more is asked: the first line says how things are to be made, each other what to do.

    Args:
        made: of the first line, the functions that later ones name as "do", with their arguments beside it.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(value: Any) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    try:
        functions = made(json.loads(sys.stdin.readline()))
    except ImportError as error:
        say({"missing": str(error)})
        return
    say({})
    for line in sys.stdin:
        command = json.loads(line)
        say(functions[command.pop("do")](**command))
