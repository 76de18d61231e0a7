"""Says before any work whether a method can run on a model, and which methods could instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate import methods
from foveate.core import FoveateError, Method, check_depths
from foveate.cost.plan import visual_per_layer
from foveate.cost.shapes import ModelShape
from foveate.families import Family, Tower, family_of
from foveate.runtime.choose import JOINT
from foveate.runtime.probe import LATEST, missing_signals
from foveate.spec import format as format_spec

SITES = ("tower", "input", "layer", "cache")
"""Sites at which the runtime can act."""

_GIVEN = ("features", "text", "text_mask", "after_image")
_DECODER = (
    "hidden",
    "keys",
    "last_query",
    "text_query",
    "next_query",
    "text_hidden",
    "text_keys",
    "normed",
    "text_normed",
)
_CACHE = ("scores", "age", "keys", "window_queries")


def check_parts(model: Any, parts: Sequence[Method]) -> None:
    """Refuse parts whose site or signals this model cannot serve.

    Raises:
        FoveateError: naming the signal, and the methods that work on this model.
    """
    family = family_of(model)
    encoder, tower = family.tower_of(model)
    if family.check is not None:
        family.check(model.config, tower)
    ModelShape.from_config(model.config)  # what a trace counts must be known before work starts
    layers = len(model.get_decoder().layers)
    for part in parts:
        name = format_spec(part)
        if part.site not in SITES:
            raise FoveateError(f"{name} acts at site {part.site!r}; sites that can be used: {', '.join(SITES)}")
        if part.site == "tower" and family.inside is not None:
            raise FoveateError(
                f"{name} acts inside the encoder, which {family.name} does not allow: {family.inside}; methods that "
                f"work: {', '.join(working_methods(tower, family))}"
            )
        missing = unavailable(part, tower)
        if missing:
            raise FoveateError(
                f"{name} needs {', '.join(missing)}, which {family.name} with {tower.type} does not have; methods that "
                f"work: {', '.join(working_methods(tower, family))}"
            )
        part.check_model(model.config)
        if part.site == "tower":
            part.depths(len(tower.blocks_of(encoder)))  # a method says itself what it cannot do with so many
        if part.site == "layer":
            check_depths(part.depths(layers), layers, name)
    if sum(part.site == "cache" for part in parts) > 1:
        raise FoveateError("two methods would evict from one cache; give one of them")
    if family.fixed and not any(part.adaptive for part in parts):
        grid = family.grid(model.config)
        visual_per_layer(parts, grid[0] * grid[1], layers, grid=grid)


def unavailable(part: Method, tower: Tower) -> list[str]:
    """The signals of a method that cannot be had from this encoder."""
    missing = missing_signals(part.needs, tower)
    for need in part.needs:
        room, _, field = need.partition(".")
        if part.site != "tower" and need.startswith(f"tower.{LATEST}."):
            missing.append(f"{need} outside the encoder")
        if room == "decoder" and part.site == "layer" and field in _DECODER:
            continue
        if room == "cache" and part.site == "cache" and field in _CACHE:
            continue
        if room != "tower" and part.site == "tower":
            missing.append(f"{need} inside the encoder")
        elif need in JOINT and tower.joint:
            continue
        elif room != "tower" and need not in _GIVEN:
            missing.append(need)
    return missing


def working_methods(tower: Tower, family: Family | None = None) -> list[str]:
    """Names of the methods that can run with this encoder, of a family that may not allow all sites."""
    found = []
    for name in methods.names():
        parts = methods.get(name).example().parts()
        closed = family is not None and family.inside is not None and any(part.site == "tower" for part in parts)
        if not closed and all(part.site in SITES and not unavailable(part, tower) for part in parts):
            found.append(name)
    return found


def working_methods_of(model: Any) -> list[str]:
    """Names of the methods that can run on a model."""
    family = family_of(model)
    return working_methods(family.tower_of(model)[1], family)
