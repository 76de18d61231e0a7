"""Which error is the caller's: exit codes, and the mark that argument checks put on errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from foveate.core import FoveateError

FAILURE = 1
USAGE = 2
INTERRUPTED = 130


class UsageError(FoveateError):
    """An argument of the command line is wrong; nothing has been done."""


@contextmanager
def usage() -> Iterator[None]:
    """What fails in here is an argument that cannot be used."""
    try:
        yield
    except FoveateError as error:
        raise UsageError(str(error)) from error


def one_line(message: str) -> str:
    """A message without line breaks."""
    return " ".join(message.split())
