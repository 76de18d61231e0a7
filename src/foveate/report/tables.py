"""Rows of figures as a rich table, as aligned plain text, or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the row's entry.
        title: what stands above it.
        write: how a value is written; an entry that is None or missing shows as "-".
        left: words are aligned left, figures right.
        whole: on a terminal its words are not broken; other columns give way.
    """

    key: str
    title: str
    write: Callable[[Any], str] = str
    left: bool = False
    whole: bool = False

    def cell(self, row: Mapping[str, Any]) -> str:
        """The text of this column in one row; several lines where `write` breaks them."""
        value = row.get(self.key)
        return "-" if value is None else self.write(value)

    def line(self, row: Mapping[str, Any]) -> str:
        """The same on one line."""
        return " ".join(self.cell(row).split("\n"))


def rich_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """A table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        side: Literal["left", "right"] = "left" if column.left else "right"
        table.add_column(Text(column.title), justify=side, overflow="fold", no_wrap=column.whole)
    for row in rows:
        # Text is shown as it is: the brackets of a spec are no markup.
        table.add_row(*(Text(column.cell(row)) for column in columns))
    return table


def plain(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns of text, one line for each row, for files and pipes."""
    cells = [[column.title for column in columns], *([column.line(row) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if column.left else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table."""
    lines = [[column.title for column in columns], ["---" if column.left else "---:" for column in columns]]
    lines += [[column.line(row).replace("|", "\\|") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
