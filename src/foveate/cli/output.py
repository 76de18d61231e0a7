"""What commands write: tables and JSON on stdout, progress on stderr, files under a temporary name first."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from foveate.core import FoveateError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table

    from foveate.evaluate.tables import Column


WIDTH = 110  # of a drawn table in a file or pipe


def stdout() -> Console:
    """The console of results."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def stderr() -> Console:
    """The console of progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def working(text: str) -> Status:
    """A sign of life on stderr while something runs, redrawn so seldom that it does not disturb what is timed."""
    return stderr().status(text, refresh_per_second=2)


def show(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Print rows: a drawn table on a terminal, aligned text in files and pipes."""
    from foveate.evaluate.tables import plain, rich_table

    console = stdout()
    if console.is_terminal:
        console.print(rich_table(columns, rows, title))
    else:
        typer.echo(plain(columns, rows))


def show_table(table: Table) -> None:
    """Print a table that is drawn already."""
    stdout().print(table)


def show_json(value: Any) -> None:
    """Print one JSON value on one line."""
    typer.echo(json.dumps(value))


def check_target(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse, before any work, a file that could not be written at its end.

    Raises:
        FoveateError: another suffix than `suffixes`, a folder that is not there, or a folder of this name.
    """
    if path.suffix.lower() not in suffixes:
        raise FoveateError(f"{path} ends in {path.suffix or 'nothing'!r}; the choices are {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FoveateError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise FoveateError(f"{path} cannot be written: it is a folder")


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value to a file, all of it or nothing."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
