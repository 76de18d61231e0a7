"""What `foveate eval` wrote, read to be shown: every value is checked, since files come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.core import FoveateError, short
from foveate.evaluate.results import UNPRUNED
from foveate.paths import Given, checked, read_json

ROWS = "rows.json"
"""The file in the folder of a run."""

MOST_BYTES = 200_000_000

_SHARES = ("accuracy",)
_NUMBERS = ("tokens", "equivalent_tokens", "prefill_flops_share", "kv_bytes_share", "first_token_ms", "whole_ms")


@dataclass(frozen=True)
class Measured:
    """Rows of one model on one task.

    Attributes:
        questions: how many each rival was asked.
        command: that measured them, or "".
        rows: as the file has them, the unpruned model's first.
        unreached: methods that were not measured: `method`, `keep` and `why`.
        pictures: as `evaluate.looks.looks` returns them.
    """

    model: str
    task: str
    questions: int
    command: str
    rows: tuple[dict[str, Any], ...]
    unreached: tuple[dict[str, Any], ...] = ()
    pictures: tuple[dict[str, Any], ...] = ()


def read(source: Given) -> Measured:
    """A file of `foveate eval --json`, or the folder of a run.

    Raises:
        FoveateError: it is not there, or holds something else; what is wrong is named.
    """
    path = checked(source)
    if path.is_dir():
        if not (path / ROWS).is_file():
            raise FoveateError(f"{path} holds no {ROWS}; a run of foveate eval writes it when it has ended")
        path = path / ROWS
    found = read_json(path, str(path), most=MOST_BYTES)
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise FoveateError(f"{path} is no file of foveate eval: it holds no list of rows")
    rows = [_row(path, number, row) for number, row in enumerate(found["rows"], start=1)]
    rows.sort(key=lambda row: row["method"] != UNPRUNED)
    if not rows or rows[0]["method"] != UNPRUNED:
        raise FoveateError(f"{path} lacks the row of the unpruned model, with which all others are compared")
    questions = found.get("samples", found.get("questions"))
    if not isinstance(questions, int) or not all(isinstance(found.get(name), str) for name in ("model", "task")):
        raise FoveateError(f"{path} is no file of foveate eval: it lacks its model, its task or how much was asked")
    return Measured(
        found["model"],
        found["task"],
        questions,
        str(found.get("command", "")),
        tuple(rows),
        tuple(one for one in _list(path, found, "unreached") if isinstance(one.get("method"), str)),
        tuple(_picture(path, number, one) for number, one in enumerate(_list(path, found, "pictures"), start=1)),
    )


def _list(path: Path, found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    entries = found.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FoveateError(f"{path} cannot be shown: its {name} are no list of objects")
    return entries


def _row(path: Path, number: int, row: Any) -> dict[str, Any]:
    """A row whose figures are numbers."""
    if not isinstance(row, dict) or not isinstance(row.get("method"), str):
        raise FoveateError(f"{path} cannot be shown: row {number} names no method")
    where = f"{path} cannot be shown: row {number}, {short(row['method'])},"
    for name in (*_SHARES, "equivalent_tokens"):
        if name not in row:
            raise FoveateError(f"{where} has no {name}")
    for name in (*_SHARES, *_NUMBERS):
        if name in row and not _number(row[name]):
            raise FoveateError(f"{where} has {name} {short(repr(row[name]))}, which is no number from 0")
    for name, most in (("interval", 2), ("layers", None)):
        values = row.get(name, [])
        right = isinstance(values, list) and all(map(_number, values)) and (most is None or len(values) in (0, most))
        if not right:
            raise FoveateError(f"{where} has {name} {short(repr(values))}, which is no list of numbers")
    return row


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _picture(path: Path, number: int, found: dict[str, Any]) -> dict[str, Any]:
    """A picture whose stages name places in its raster."""
    where = f"{path} cannot be shown: picture {number}"
    grid, rivals = found.get("grid"), found.get("rivals")
    texts = all(isinstance(found.get(name), str) for name in ("question", "right", "png"))
    if not texts or not isinstance(rivals, dict):
        raise FoveateError(f"{where} lacks its question, its answer, its pixels or its rivals")
    if grid is not None and not (isinstance(grid, list) and len(grid) == 2 and all(map(_side, grid))):
        raise FoveateError(f"{where} has the grid {short(repr(grid))}, which is no height and width in tokens")
    places = 0 if grid is None else grid[0] * grid[1]
    for name, one in rivals.items():
        stages = one.get("stages") if isinstance(one, dict) else None
        if not isinstance(stages, list) or not isinstance(one.get("answer"), str):
            raise FoveateError(f"{where}: {short(name)} lacks its answer or its stages")
        if not all(_is_stage(stage, places) for stage in stages):
            raise FoveateError(f"{where}: a stage of {short(name)} does not fit a raster of {places} tokens")
        if not _is_scaled(one.get("scaled")):
            raise FoveateError(f"{where}: {short(name)} does not say to how many tokens it was scaled down")
    return found


def _is_stage(stage: Any, places: int) -> bool:
    if not isinstance(stage, dict) or not isinstance(stage.get("method"), str):
        return False
    kept, scores = stage.get("kept"), stage.get("scores")
    if not (isinstance(kept, list) and all(_side(one + 1) and one < places for one in kept if isinstance(one, int))):
        return False
    if not all(
        isinstance(one, int) and not isinstance(one, bool) for one in [*kept, stage.get("before"), stage.get("after")]
    ):
        return False
    finite = [None if one is None else isinstance(one, int | float) and math.isfinite(one) for one in scores or []]
    return scores is None or (isinstance(scores, list) and len(scores) == places and False not in finite)


def _is_scaled(scaled: Any) -> bool:
    """None is of a rival that scales nothing."""
    if scaled is None:
        return True
    counts = [scaled.get(name) for name in ("before", "after")] if isinstance(scaled, dict) else [None]
    return all(isinstance(one, int) and not isinstance(one, bool) for one in counts)


def _side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10_000
