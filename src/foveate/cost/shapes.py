"""The shape of a model by its name, its config or its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.core import FoveateError, did_you_mean, short
from foveate.families.shapes import ModelShape
from foveate.paths import checked, read_json


def shape(name_or_config: Any) -> ModelShape:
    """The shape of a preset by its name, of a config (object, dict, or the folder that holds it), or the shape itself.

    Raises:
        FoveateError: no preset or folder has that name, or the config's model is not known.
    """
    from foveate.cost.presets import PRESETS

    if isinstance(name_or_config, ModelShape):
        return name_or_config
    if not isinstance(name_or_config, str | Path):
        return ModelShape.from_config(name_or_config)
    name = str(name_or_config)
    found = PRESETS.get(name.lower())
    if found is not None:
        return found
    path = checked(name_or_config)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return ModelShape.from_config(_stored(file))
    where = "holds no config.json" if path.is_dir() else "is no preset and no folder"
    raise FoveateError(f"{short(repr(name))} {where}; {did_you_mean(name.lower(), PRESETS)}")


def _stored(file: Path) -> dict[str, Any]:
    config = read_json(file, str(file), "a config")
    if not isinstance(config, dict):
        raise FoveateError(f"{file} holds a {type(config).__name__}, no config; give a model's config.json")
    return {"_name_or_path": str(file.parent), **{key: value for key, value in config.items() if value != ""}}
