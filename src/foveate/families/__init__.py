"""One row per model family: what its parts are called, and how its tower's scores map to its tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from foveate.core import FoveateError
from foveate.families.family import Family
from foveate.families.rows import FAMILIES, UNFIT


def family_of(model: Any) -> Family:
    """The row of a loaded model; for a type that has none, one made of the standard parts that the model has.

    Raises:
        FoveateError: the model is no vision-language model, is known not to fit, or has no row and lacks a standard
            part.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise FoveateError(
            f"{type(model).__name__} is no transformers model; load one with AutoModelForImageTextToText"
        )
    for family in FAMILIES:
        if kind in family.types:
            if not hasattr(model, "generate"):
                raise FoveateError(
                    f"{type(model).__name__} has no generate(); load it with AutoModelForImageTextToText, not AutoModel"
                )
            return family if family.varies is None else replace(family, **family.varies(config))
    if kind in UNFIT:
        raise FoveateError(
            f"{type(model).__name__} ({kind}) cannot be pruned: {UNFIT[kind]}; `foveate models` lists the families"
        )
    known = ", ".join(f"{family.name} ({', '.join(family.types)})" for family in FAMILIES)
    if not hasattr(config, "vision_config"):
        raise FoveateError(f"{type(model).__name__} ({kind}) is no vision-language model; known families: {known}")
    from foveate.families.generic import generic_family

    return generic_family(model)
