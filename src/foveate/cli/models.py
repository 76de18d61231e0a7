"""`foveate models`: the families of models that can be pruned."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the families of models, the checkpoints each is known by, and the transformers that they need."""
    from foveate.cli.output import show, show_json
    from foveate.evaluate.tables import Column
    from foveate.families import FAMILIES

    rows = [
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
    if as_json:
        show_json(rows)
        return
    columns = [
        Column("name", "family", left=True),
        Column("types", "model_type", ", ".join, left=True),
        Column("models", "models (mini ships with Foveate)", ", ".join, left=True),
        Column("image", "one image is", left=True),
        Column("transformers", "transformers", lambda version: f">= {version}", left=True),
    ]
    show(columns, rows)
