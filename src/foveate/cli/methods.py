"""`foveate methods`: every reduction method, what it keeps, and where it acts; or everything about one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foveate.core import usage


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show one method: fields, signals, paper.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods with what each keeps and where it acts; with NAME, say everything about one."""
    from foveate import methods
    from foveate.cli.output import show, show_json
    from foveate.evaluate.catalogue import describe
    from foveate.report.tables import Column

    if name is not None:
        with usage():
            row = describe(name)
        show_json(row) if as_json else _show_one(row)
        return
    rows = [describe(known) for known in methods.names()]
    if as_json:
        show_json(rows)
        return
    columns = [
        Column("name", "name", left=True, whole=True),
        Column("site", "site", left=True, whole=True),
        Column("keeps", "what it keeps and why", left=True),
    ]
    show(columns, rows)


def _show_one(row: dict[str, Any]) -> None:
    from foveate.cli.output import show_entries
    from foveate.evaluate.catalogue import about

    text, arguments = about(row["name"])
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    show_entries(
        {
            row["name"]: "\n".join([row["keeps"], *paragraphs]),
            "acts": row["acts"],
            "reads": ", ".join(row["needs"]) or "nothing",
            "class": row["class"],
            "paper": row["paper"] or "",
            "official": "official=true gives the released code's numbers" if row["official"] else "",
            "weights": "trained ones, by from=FOLDER" if row["trained"] else "",
        }
    )
    values = {**dict.fromkeys(row["required"], "..."), **{key: _value(value) for key, value in row["defaults"].items()}}
    typer.echo()
    show_entries({f"{field}={value}": arguments.get(field, "") for field, value in values.items()})


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return "/".join(map(_value, value)) if isinstance(value, tuple) else str(value)
