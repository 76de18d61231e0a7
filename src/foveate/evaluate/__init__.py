"""Measures answers and seconds: tasks, greedy answering, latency and the tables that show them."""

from __future__ import annotations

from collections.abc import Iterable

from foveate.core import FoveateError, did_you_mean

TASKS = ("scenes",)


def task_names(given: Iterable[str]) -> tuple[str, ...]:
    """The tasks of a comma-separated list or of several.

    Raises:
        FoveateError: a task that does not exist, or none.
    """
    names = tuple(dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip()))
    for name in names:
        if name not in TASKS:
            hint = (
                " A folder with questions.jsonl is a task too, and there is none of this name." if "/" in name else ""
            )
            raise FoveateError(f"unknown task {name!r}; {did_you_mean(name, TASKS)}{hint}")
    if not names:
        raise FoveateError(f"no task was given; {did_you_mean('', TASKS)}")
    return names
