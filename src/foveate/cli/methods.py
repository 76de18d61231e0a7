"""`foveate methods`: every reduction method, what it keeps, and where it acts."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods with what each keeps, where it acts, what it reads, its defaults and its paper."""
    from foveate import methods
    from foveate.cli.output import show, show_json
    from foveate.evaluate.catalogue import describe
    from foveate.evaluate.tables import Column

    rows = [describe(name) for name in methods.names()]
    if as_json:
        show_json(rows)
        return
    for row in rows:
        code = "official=true gives the released code's numbers" if row["official"] else ""
        row["about"] = [line for line in (row["keeps"], (row["paper"] or "").removeprefix("https://"), code) if line]
    columns = [
        Column("name", "name", left=True),
        Column("about", "what it keeps and why, and its paper", "\n".join, left=True),
        Column("site", "site", left=True),
        Column("needs", "reads", lambda needs: ",\n".join(needs) or "nothing", left=True),
        Column("defaults", "defaults", _defaults, left=True),
    ]
    show(columns, rows)


def _defaults(values: dict[str, Any]) -> str:
    return ",\n".join(f"{name}={_value(value)}" for name, value in values.items()) or "none"


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return "/".join(map(_value, value)) if isinstance(value, tuple) else str(value)
