"""What the commands say of a method that scales pictures where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prune", "resize:keep=0.5"), "the processor of llava-1.5 makes as many tokens of a small one"),
        (("--prune", "resize:keep=0.5+fopru"), "joins stages to one that scales the picture"),
        (("--prune", "resize", "--draw", "a.png"), "a picture that is scaled down has others"),
    ],
)
def test_run_refuses(
    call: Any, folder: Path, picture: Path, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = call("run", folder, picture, "w7 w8", "--device", "cpu", *arguments)
    assert result.code != 0 and result.out == ""
    assert message in " ".join(result.err.split())


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_joined_stages_are_refused_before_a_model_is_loaded(call: Any, command: str) -> None:
    place = {"eval": ("eval", "--tasks", "scenes", "--model"), "bench": ("bench",)}[command]
    result = call(*place, "no/such-model", "--prune", "fopru+resize:keep=9")
    assert (result.code, result.out) == (2, "")
    assert "give resize:keep=9 alone" in " ".join(result.err.split())
