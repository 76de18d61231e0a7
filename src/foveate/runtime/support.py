"""Says before any work whether a method can run on a model, and which methods could instead."""

from __future__ import annotations

import dataclasses
import itertools
import typing
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from foveate import methods
from foveate.choosing.signals import JOINT
from foveate.core import Block, CacheBlock, FoveateError, Method, Signals, hints_of, names_of
from foveate.cost.plan import visual_per_layer
from foveate.depths import check_depths
from foveate.families import family_of
from foveate.families.family import Family
from foveate.families.generic import GenericFamily
from foveate.families.reading import assume_model, read_or_assume
from foveate.families.shapes import ModelShape
from foveate.families.towers import Tower
from foveate.runtime.encoder.probe import LATEST, missing_signals
from foveate.runtime.wrapped import check_devices, check_version
from foveate.spec import format as format_spec

SITES = ("pixels", "tower", "input", "layer", "cache")
"""Sites at which the runtime can act."""

_SHAPES: weakref.WeakKeyDictionary[Any, tuple[str, Family, tuple[ModelShape, tuple[str, ...]]]]
_SHAPES = weakref.WeakKeyDictionary()  # by model, with what its configuration stated: reading copies all of it

_FORMS = ("attention", "space")
"""Fields whose choices ask different things of an encoder."""


def check_parts(model: Any, parts: Sequence[Method]) -> ModelShape:
    """Refuse parts whose site or signals this model cannot serve.

    Returns:
        The sizes by which a trace counts, as `shape_of` has them.

    Raises:
        FoveateError: naming the signal, and the methods that work on this model.
    """
    family = family_of(model)
    if isinstance(family, GenericFamily):
        warnings.warn(family.warning, UserWarning, stacklevel=3)
    encoder, tower = family.tower_of(model)
    if family.check is not None:
        family.check(model.config, tower)
    check_version(family)
    shape, assumed = _shape(model, family)  # what a trace counts must be known before work starts
    if assumed:
        warnings.warn(
            f"{family.name}: not all sizes are known, and where it counts what pruning saves, this is assumed: "
            f"{'; '.join(assumed)}. What is pruned does not depend on it",
            UserWarning,
            stacklevel=3,
        )
    layers = len(model.get_decoder().layers)
    for part in parts:
        if part.site == "picture":
            raise FoveateError(
                f"{format_spec(part)} scales the picture before the processor makes tokens of it, and prune() is given "
                "what the processor has made; foveate eval, run and bench scale it, and so does foveate.scale_down"
            )
        if part.site not in SITES:
            name, sites = format_spec(part), ", ".join(SITES)
            raise FoveateError(f"{name} acts at site {part.site!r}; sites that can be used: {sites}")
    refused = first_refused(parts, family, tower)
    if refused is not None:
        works = ", ".join(working_methods(family, tower))
        raise FoveateError(f"{format_spec(refused)} {why_not(refused, family, tower)}; methods that work: {works}")
    for part in parts:
        check_devices(model, part)
        part.check_model(model.config)
        if part.site == "tower":
            part.depths(len(tower.blocks_of(encoder)))  # a method says itself what it cannot do with so many
        if part.site == "layer":
            check_depths(part.depths(layers), layers, format_spec(part))
    if sum(part.site == "cache" for part in parts) > 1:
        raise FoveateError("two methods would evict from one cache; give one of them")
    if family.fixed and not tower.packed and not any(part.adaptive for part in parts):
        grid = family.grid(model.config)
        visual_per_layer(parts, grid[0] * grid[1], layers, grid=grid)
    return shape


def shape_of(model: Any, family: Family) -> ModelShape:
    """The sizes by which a trace counts; what of them is not known is assumed.

    Raises:
        FoveateError: a size that the configuration does not state.
    """
    return _shape(model, family)[0]


def assumptions(model: Any, family: Family) -> tuple[str, ...]:
    """What is taken for granted of a model, in words: of its parts where it has no row, of its sizes where one does not
    say them."""
    return family.assumed if isinstance(family, GenericFamily) else _shape(model, family)[1]


def _shape(model: Any, family: Family) -> tuple[ModelShape, tuple[str, ...]]:
    stated = _stated(model.config)
    known = _SHAPES.get(model)
    if known is not None and known[:2] == (stated, family):
        return known[2]
    if isinstance(family, GenericFamily):  # which has warned of all that it assumes
        found: tuple[ModelShape, tuple[str, ...]] = assume_model(model.config), ()
    else:
        encoder, tower = family.tower_of(model)
        found = read_or_assume(model.config, family, len(tower.blocks_of(encoder)))
    _SHAPES[model] = stated, family, found
    return found


def _stated(config: Any) -> str:
    """All that a configuration states, to tell whether it has been changed; a tenth of what copying it costs."""
    entries = vars(config)
    below = [value for value in entries.values() if hasattr(value, "to_dict")]
    own = {name: value for name, value in entries.items() if not hasattr(value, "to_dict")}
    return "".join([repr(own), *map(_stated, below)])


def why_not(part: Method, family: Family, tower: Tower) -> str | None:
    """Why a method cannot run on a family with this encoder, and with which settings it can; None where it can."""
    reason = _reason(part, family, tower)
    settings = None if reason is None else other_form(part, family, tower)
    return reason if not settings else f"{reason} (with {settings} it runs)"


def first_refused(parts: Sequence[Method], family: Family, tower: Tower) -> Method | None:
    """Of the parts that cannot run, the first that no setting helps, or else the first; None where all can."""
    refused = [part for part in parts if _reason(part, family, tower) is not None]
    final = [part for part in refused if other_form(part, family, tower) is None]
    return next(iter(final or refused), None)


def _reason(part: Method, family: Family, tower: Tower) -> str | None:
    if part.site == "picture":
        small = f"scales the picture down, and the processor of {family.name} makes as many tokens of a small one"
        return None if tower.packed else f"{small}: it scales it up again, to one grid or to tiles of one size"
    if part.site in ("pixels", "tower") and family.closed_encoder is not None:
        where = "inside" if part.site == "tower" else "before"
        return f"acts {where} the encoder, which {family.name} does not allow: {family.closed_encoder}"
    if part.site in ("layer", "cache") and family.closed_decoder is not None:
        where = "inside the decoder" if part.site == "layer" else "on the cache"
        return f"acts {where}, which {family.name} does not allow: {family.closed_decoder}"
    missing = unavailable(part, tower)
    if missing:
        return f"needs {', '.join(missing)}, which {family.name} with {tower.type} does not have"
    if part.encoded and not family.pointwise:
        return f"merges tokens of the encoder, and the projector of {family.name} takes no single ones"
    return None


def other_form(method: Method, family: Family, tower: Tower) -> str | None:
    """The fewest settings with which a method could run that cannot as it is, as a spec has them; None without."""
    hints = hints_of(type(method))
    choices = {
        name: [choice for choice in typing.get_args(hints[name]) if choice != getattr(method, name)]
        for name in _FORMS
        if name in hints
    }
    for many in range(1, len(choices) + 1):
        for names in itertools.combinations(choices, many):
            for values in itertools.product(*(choices[name] for name in names)):
                try:
                    made = dataclasses.replace(method, **dict(zip(names, values, strict=True)))
                except FoveateError:
                    continue
                if all(_reason(part, family, tower) is None for part in made.parts()):
                    return ",".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    return None


def unavailable(part: Method, tower: Tower) -> list[str]:
    """The signals of a method that cannot be had from this encoder."""
    missing = missing_signals(part.needs, tower)
    for need in part.needs:
        room, _, field = need.partition(".")
        if part.site != "tower" and need.startswith(f"tower.{LATEST}."):
            missing.append(f"{need} outside the encoder")
        if room == "decoder" and part.site == "layer" and field in names_of(Block, room="decoder"):
            continue
        if room == "cache" and part.site == "cache" and field in names_of(CacheBlock, room="cache"):
            continue
        if part.site == "pixels":
            missing += [] if need in names_of(Signals, room="picture") else [f"{need} before the encoder"]
        elif room != "tower" and part.site == "tower":
            missing.append(f"{need} inside the encoder")
        elif need in JOINT and tower.joint:
            continue
        elif room != "tower" and need not in names_of(Signals, room="prompt"):
            missing.append(need)
    return missing


def working_methods(family: Family, tower: Tower) -> list[str]:
    """Names of the methods that can run on a family with this encoder."""
    found = []
    for name in methods.names():
        parts = methods.get(name).example().parts()
        if all(part.site in SITES and why_not(part, family, tower) is None for part in parts):
            found.append(name)
    return found
