"""What commands print: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table

    from foveate.report.tables import Column


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


def note_precision(model: Any) -> None:
    """Say so on stderr where the model's precision is what makes it slow on this machine."""
    from foveate.inference.loading import slow_precision

    words = slow_precision(model)
    if words is not None:
        typer.echo(f"Note: {words}.", err=True)


@contextmanager
def counting(what: str, total: int, *, seen: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where somebody looks; told how many more of `total` pieces of work are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = stderr()
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=console, transient=True, disable=not (console.is_terminal and seen)) as bar:
        done = bar.add_task(what, total=total)
        yield lambda count: bar.advance(done, count)


def show(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Print rows: a drawn table on a terminal, aligned text in files and pipes."""
    from foveate.report.tables import plain, rich_table

    console = stdout()
    if console.is_terminal:
        console.print(rich_table(columns, rows, title))
    else:
        typer.echo(plain(columns, rows))


def show_entries(entries: Mapping[str, str]) -> None:
    """Print names, and beside each in lines that fit what is said of it; without anything said a name is left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in entries.items():
        if said:
            table.add_row(Text(name), Text(said))
    stdout().print(table)


def show_table(table: Table) -> None:
    """Print a table that is drawn already."""
    stdout().print(table)


def show_json(value: Any) -> None:
    """Print one JSON value on one line."""
    typer.echo(json.dumps(value))
