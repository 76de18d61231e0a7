"""Accuracy against tokens, from a file of `foveate eval --json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.evaluate import results

SHOWN = 6
"""Methods that are drawn at first."""


@dataclass(frozen=True)
class Point:
    """One row: a method at a budget."""

    method: str
    spec: str
    tokens: float
    accuracy: float


def points(path: str | Path) -> list[Point]:
    """The rows of a file that have an accuracy, those of one method together, the fewest tokens first.

    Raises:
        FoveateError: it is no file of `foveate eval --json`.
    """
    found = results.read(path)
    made = []
    for row in found["rows"]:
        values: tuple[Any, Any] = row.get("equivalent_tokens", row.get("tokens")), row.get("accuracy")
        if all(isinstance(value, int | float) for value in values):
            made.append(Point(row["method"].partition(":")[0], row["method"], *values))
    return sorted(made, key=lambda one: (one.method, one.tokens))


def first_shown(found: list[Point]) -> list[str]:
    """The methods with the best accuracy at their fewest tokens, and the unpruned model."""
    least: dict[str, Point] = {}
    for one in found:
        least.setdefault(one.method, one)
    rivals = sorted((one for one in least.values() if one.method != results.UNPRUNED), key=lambda one: -one.accuracy)
    return [results.UNPRUNED, *(one.method for one in rivals[:SHOWN])]


def table(found: list[Point], shown: list[str]) -> str:
    """Markdown: what is drawn, in figures."""
    lines = ["| method | tokens | accuracy |", "| --- | ---: | ---: |"]
    lines += [f"| `{one.spec}` | {one.tokens:.4g} | {one.accuracy:.1%} |" for one in found if one.method in shown]
    return "\n".join(lines)
