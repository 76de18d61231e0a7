"""Which error is the caller's: exit codes, the mark that argument checks put on errors, and the words of options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from foveate.core import FoveateError, UsageError, short

FAILURE = 1
USAGE = 2
INTERRUPTED = 130

LONGEST_WORD, LONGEST_MESSAGE = 600, 4_000
"""Characters; paths and lists of choices are shorter."""


@contextmanager
def in_options(command: Callable[..., Any]) -> Iterator[None]:
    """Errors of the library name its parameters; who has typed options reads of those of `command` instead."""
    try:
        yield
    except FoveateError as error:
        kind = UsageError if isinstance(error, UsageError) else FoveateError
        raise kind(as_options(str(error), inspect.signature(command).parameters)) from error


def as_options(message: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """A message in which every `name=value` of a parameter is the option that says so.

    `batch=5` becomes `--batch 5`, `ratios=(0.5, 0.3)` `--ratios 0.5/0.3`, `resume=True` `--resume`.
    """

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        flag = f"--{name.replace('_', '-')}"
        if value in ("True", "False", "None"):
            on = value == "True"
            negated = f"--no-{flag[2:]}" if parameters[name].default is True else f"no {flag}"
            return flag if on else negated
        if value[0] in "([":
            value = value[1:-1].rstrip(",").replace(", ", "/")
        return f"{flag} {value}"

    names = "|".join(map(re.escape, parameters))
    value = r"\([^)]*\)|\[[^\]]*\]|\{[^}]*\}|'[^']*'|[^\s,;)]*[^\s,;:.)]"
    return re.sub(rf"(?<![\w.])(?P<name>{names})=(?P<value>{value})", option, message)


def one_line(message: str) -> str:
    """A message without line breaks, and without the middle of what a user wrote at too great a length."""
    return short(" ".join(short(word, LONGEST_WORD) for word in message.split()), LONGEST_MESSAGE)
