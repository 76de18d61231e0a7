"""`foveate methods`: every reduction method, what it keeps, and where it acts."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods with what each keeps, where it acts, what it reads, its defaults and its paper."""
    from foveate.cli.output import show, show_json
    from foveate.evaluate.tables import Column

    rows = [_row(name) for name in _names()]
    if as_json:
        show_json(rows)
        return
    for row in rows:
        row["about"] = [row["keeps"], *([row["paper"].removeprefix("https://")] if row["paper"] else [])]
    columns = [
        Column("name", "name", left=True),
        Column("about", "what it keeps and why, and its paper", "\n".join, left=True),
        Column("site", "site", left=True),
        Column("needs", "reads", lambda needs: ",\n".join(needs) or "nothing", left=True),
        Column("defaults", "defaults", _defaults, left=True),
    ]
    show(columns, rows)


def _names() -> tuple[str, ...]:
    from foveate import methods

    return tuple(methods.names())


def _row(name: str) -> dict[str, Any]:
    import dataclasses

    from foveate import methods

    kind = methods.get(name)
    example = kind.example()
    parts = example.parts()
    fields = [field for field in dataclasses.fields(kind) if field.init]
    return {
        "name": name,
        "keeps": methods.summary(kind),
        "site": "+".join(dict.fromkeys(part.site for part in parts)),
        "needs": list(dict.fromkeys(need for part in parts for need in part.needs)),
        "defaults": {
            field.name: getattr(example, field.name) for field in fields if field.default is not dataclasses.MISSING
        },
        "required": [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING],
        "adaptive": kind.adaptive,
        "paper": kind.paper or None,
    }


def _defaults(values: dict[str, Any]) -> str:
    return ",\n".join(f"{name}={_value(value)}" for name, value in values.items()) or "none"


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return "/".join(map(_value, value)) if isinstance(value, tuple) else str(value)
