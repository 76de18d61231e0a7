"""`foveate models`: the families of models that can be pruned; or everything about one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foveate.core import UsageError


def command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Show one family, by its name or model_type.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the families of models and checkpoints that each is known by; with NAME, say everything about one."""
    from foveate.cli.output import show, show_entries, show_json
    from foveate.report.tables import Column

    rows = _rows()
    if name is not None:
        row = _row(rows, name)
        show_json(row) if as_json else show_entries(_entries(row))
        return
    if as_json:
        show_json(rows)
        return
    columns = [
        Column("name", "family", left=True, whole=True),
        Column("models", "models (mini ships with Foveate)", ",\n".join, left=True),
    ]
    show(columns, rows)


def _rows() -> list[dict[str, Any]]:
    from foveate.families.rows import FAMILIES

    return [
        {
            "name": family.name,
            "types": list(family.types),
            "models": [*(["mini"] if "llava" in family.types else []), *family.hub_ids],
            "image": family.image,
            "videos": family.videos is not None or family.frames,
            "transformers": family.transformers,
        }
        for family in FAMILIES
    ]


def _row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    from foveate.core import did_you_mean, short

    for row in rows:
        if name == row["name"] or name in row["types"]:
            return row
    raise UsageError(f"unknown family {short(repr(name))}; {did_you_mean(name, (row['name'] for row in rows))}")


def _entries(row: dict[str, Any]) -> dict[str, str]:
    return {
        "family": row["name"],
        "model_type": ", ".join(row["types"]),
        "one image is": row["image"],
        "videos": "yes" if row["videos"] else "no",
        "transformers": f">= {row['transformers']}",
        "models": "\n".join(row["models"]),
    }
