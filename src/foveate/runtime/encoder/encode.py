"""Runs a model's vision encoder by itself, as generate() would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.runtime.arguments import PIXELS, accepted


def encoder_of(kind: str) -> str:
    """Name of the base model's method that encodes pictures ("image") or videos ("video")."""
    return f"get_{kind}_features"


def encode(model: Any, given: Mapping[str, Any], kind: str = "image") -> Any:
    """What the encoder hands over of the pictures or videos of a call; None where it brings none.

    Args:
        given: the arguments of a call, of which the encoder takes those that it has names for.
    """
    function = getattr(model.base_model, encoder_of(kind))
    arguments = {name: value for name, value in accepted(function, given).items() if value is not None}
    if PIXELS[kind] not in arguments:
        return None
    return function(**arguments, return_dict=True)


def without_pictures(model: Any, given: Mapping[str, Any], kind: str = "image") -> dict[str, Any]:
    """The arguments of a call that its encoder does not take."""
    taken = accepted(getattr(model.base_model, encoder_of(kind)), given)
    return {name: value for name, value in given.items() if name not in taken}
