"""`foveate eval`: the table, its file, and settings that are refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny


@pytest.fixture
def evaluate(call: Any, folder: Path) -> Any:
    return lambda *options: call("eval", "--model", folder, "--tasks", "scenes", "--device", "cpu", *options)


def test_the_unpruned_row_comes_first(evaluate: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ("--samples", 5, "--batch", 2, "--seed", 3, "--json", file, "--ceiling")
    result = evaluate("--prune", "random:keep=4", "--prune", "pool", *options)
    assert (result.code, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert header.split()[:2] == ["method", "all"]
    assert [line.split()[0] for line in lines] == ["none", "random:keep=4", "pool:keep=0.25", "ceiling"]
    stored = json.loads(file.read_text())
    assert {key: stored[key] for key in ("task", "samples", "seed")} == {"task": "scenes", "samples": 5, "seed": 3}
    assert [row["tokens"] for row in stored["rows"]][:3] == [tiny.TOKENS, 4, tiny.TOKENS // 4]
    assert stored["rows"][0].keys() == {
        "method", "accuracy", "interval", "existence", "color", "digit", "count", "describe",
        "tokens", "prefill_flops_share", "kv_bytes_share", "samples",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "samples=0 measures nothing; the smallest is samples=1"),
        (["--batch", "0"], "batch=0 measures nothing"),
        (["--seed", "-1"], "seed=-1 is outside"),
        (["--prune", "fopru:keep=1.5"], "keep=1.5 is no share in (0, 1]"),
        (["--tasks", "scene"], "unknown task 'scene'; did you mean 'scenes'?"),
        (["--json", "rows.csv"], "rows.csv ends in '.csv'; the choices are .json"),
        (["--json", "no/where.json"], "there is no folder no"),
    ],
)
def test_wrong_settings_are_refused_before_work(evaluate: Any, options: list[str], message: str) -> None:
    result = evaluate(*options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@pytest.mark.slow
def test_mini_beats_chance(call: Any) -> None:
    result = call("eval", "--model", "mini", "--tasks", "scenes", "--samples", 5)
    assert result.code == 0
    assert float(result.out.splitlines()[1].split()[1].rstrip("%")) >= 60
