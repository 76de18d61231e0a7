"""The same rows as a drawn table, as aligned text and as Markdown."""

from __future__ import annotations

import io

from rich.console import Console

from foveate.report.tables import Column, markdown, plain, rich_table

COLUMNS = [Column("name", "method", left=True), Column("share", "all", lambda value: f"{value:.0%}"), Column("n", "n")]
ROWS = [{"name": "fopru:keep=0.25", "share": 0.5, "n": 144}, {"name": "a|[b]", "share": None}]


def test_plain_text_is_aligned() -> None:
    assert plain(COLUMNS, ROWS).splitlines() == [
        "method           all    n",
        "fopru:keep=0.25  50%  144",
        "a|[b]              -    -",
    ]


def test_markdown() -> None:
    assert markdown(COLUMNS, ROWS).splitlines() == [
        "| method | all | n |",
        "| --- | ---: | ---: |",
        "| fopru:keep=0.25 | 50% | 144 |",
        "| a\\|[b] | - | - |",
    ]


def test_a_cell_of_several_lines_is_one_in_text() -> None:
    columns = [Column("needs", "reads", ",\n".join, left=True)]
    rows = [{"needs": ["a", "b"]}]
    assert plain(columns, rows).splitlines() == ["reads", "a, b"]
    assert markdown(columns, rows).splitlines()[2] == "| a, b |"
    console = Console(width=60, file=io.StringIO())
    console.print(rich_table(columns, rows))
    assert [line.strip() for line in console.file.getvalue().splitlines() if line.strip()][2:] == ["a,", "b"]


def test_a_drawn_table_shows_brackets_as_they_are() -> None:
    console = Console(width=60, file=io.StringIO())
    console.print(rich_table(COLUMNS, ROWS, title="five questions"))
    text = console.file.getvalue()
    assert "five questions" in text
    assert "a|[b]" in text
    assert "fopru:keep=0.25   50%   144" in text
