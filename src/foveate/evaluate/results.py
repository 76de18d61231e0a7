"""Files of results: what rows were measured on, and more rows in a file of such a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.core import FoveateError, short
from foveate.paths import Given, checked, read_json
from foveate.runs import write_json

UNPRUNED = "none"
BASELINES = ("random", "uniform", "pool", "resize")
"""What every method has to beat: tokens drawn at random, an even lattice, means of neighbours, a smaller picture."""

SAME = ("model", "adapter", "task", "samples", "seed", "data")
"""What rows of one file have in common. `adapter` is of a tuned model alone; `data` is a digest of the questions; files
without one are older than it."""

MEASURED = ("first_token_ms", "whole_ms")
"""Figures of a row that differ from one measurement to the next."""


def read(file: Given) -> dict[str, Any]:
    """A file that `foveate eval --json` wrote.

    Raises:
        FoveateError: it is not there, no JSON, or holds no rows with the unpruned model's among them.
    """
    path = checked(file)
    found = read_json(path, str(path))
    rows = found.get("rows") if isinstance(found, dict) else None
    named = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("method"), str) for row in rows)
    if not named or not {"command", "model", "task", "samples", "seed"} <= found.keys():
        raise FoveateError(f"{path} is no file of foveate eval --json: it lacks its command, model, task or rows")
    if UNPRUNED not in rows_of(found):
        raise FoveateError(f"{path} lacks the row of the unpruned model, against which further rows are checked")
    return found


def rows_of(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a result by method."""
    return {row["method"]: row for row in found["rows"]}


def check_same(file: Given, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse rows that were, or would be, measured on something else than those of a file.

    Args:
        asked: values of `SAME`, all or some.

    Raises:
        FoveateError: one of them differs; all that do are named.
    """
    differing = [name for name in SAME if name in found and name in asked and found[name] != asked[name]]
    if differing:
        said = ", ".join(f"{name}={short(repr(found[name]))}, not {short(repr(asked[name]))}" for name in differing)
        hint = "; its questions were drawn by another version" if "data" in differing else ""
        raise FoveateError(f"{file} was measured with {said}{hint}; measure all rows again with --json")


def check_unpruned(file: Given, found: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Refuse to put rows beside those of a model that answered otherwise: other weights, precision or software.

    Args:
        row: of the unpruned model, measured now.

    Raises:
        FoveateError: a figure of it differs from the file's; each that does is named.
    """
    before = rows_of(found)[UNPRUNED]
    differing = [name for name in row if name in before and name not in MEASURED and before[name] != row[name]]
    if differing:
        said = ", ".join(f"{name} {before[name]!r} there and {row[name]!r} now" for name in differing)
        raise FoveateError(
            f"the unpruned model is not the one of {file}: {said}; use its weights, --dtype, --device and versions, "
            "or measure all rows again with --json"
        )


def check_budgets(file: Given, found: Mapping[str, Any], budgets: Sequence[int]) -> None:
    """Refuse budgets that the file's other methods were not measured at.

    Raises:
        FoveateError: such a budget, or a file that was not measured at every budget of a list.
    """
    there = found.get("every", [])
    for keep in budgets:
        if keep not in there:
            choices = "/".join(map(str, there)) or "none: it was measured without --every"
            raise FoveateError(f"{file} holds no column of {keep} tokens; its budgets are {choices}")


def append(
    file: Given,
    rows: Sequence[Mapping[str, Any]],
    *,
    asked: Mapping[str, Any],
    command: str,
    budgets: Sequence[int] = (),
    unreached: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Put rows into a file, all of them or none; a row of the same method gives way.

    The file is read anew, so that what others have put there since stays.

    Args:
        rows: of the unpruned model, which must be as it was, and of each method.
        asked: what they were measured on, values of `SAME`.
        command: that measured them; the file then names it behind its own.
        budgets: at which every method was asked for, of those that the file was measured at.
        unreached: which methods cannot reach which of them, in place of what the file says.

    Returns:
        the methods whose rows gave way to others.

    Raises:
        FoveateError: as `read`, `check_same` and `check_unpruned`, or it cannot be written.
    """
    found = read(file)
    check_same(file, found, asked)
    fresh = {str(row["method"]): dict(row) for row in rows}
    check_unpruned(file, found, fresh.pop(UNPRUNED))
    before = rows_of(found)
    replaced = [name for name in fresh if name in before and before[name] != fresh[name]]
    found = {**found, **asked, "command": f"{found['command']}\n{command}", "rows": [*{**before, **fresh}.values()]}
    if budgets:
        kept = [
            {**entry, "keep": [keep for keep in entry["keep"] if keep not in budgets]} for entry in found["unreached"]
        ]
        found["unreached"] = [entry for entry in kept if entry["keep"]] + [dict(entry) for entry in unreached]
    write_json(Path(file), found)
    return replaced
