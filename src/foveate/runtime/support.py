"""Says before any work whether a method can run on a model, and which methods could instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate import methods
from foveate.core import FoveateError, Method
from foveate.families import Tower, family_of
from foveate.runtime.probe import missing_signals
from foveate.spec import format as format_spec

SITES = ("input",)
"""Sites at which the runtime can act."""

_GIVEN = ("features", "text", "text_mask", "after_image")
_OF_CLIP = ("image_clip", "text_clip")


def check_parts(model: Any, parts: Sequence[Method], **arguments: Any) -> None:
    """Refuse parts whose site or signals this model cannot serve.

    Raises:
        FoveateError: naming the signal, and the methods that work on this model.
    """
    family = family_of(model)
    _, tower = family.tower_of(model)
    for part in parts:
        name = format_spec(part)
        if part.site not in SITES:
            raise FoveateError(f"{name} acts at site {part.site!r}; sites that can be used: {', '.join(SITES)}")
        missing = unavailable(part, tower)
        if missing:
            raise FoveateError(
                f"{name} needs {', '.join(missing)}, which {family.name} with {tower.type} does not have; methods that "
                f"work: {', '.join(working_methods(tower))}"
            )
    budget_order(parts)


def unavailable(part: Method, tower: Tower) -> list[str]:
    """The signals of a method that cannot be had from this encoder."""
    missing = missing_signals(part.needs, tower)
    for need in part.needs:
        if not need.startswith("tower.") and need not in _GIVEN:
            missing.append(need)
    return missing


def working_methods(tower: Tower) -> list[str]:
    """Names of the methods that can run with this encoder."""
    found = []
    for name in methods.names():
        parts = methods.get(name).example().parts()
        if all(part.site in SITES and not unavailable(part, tower) for part in parts):
            found.append(name)
    return found


def budget_order(parts: Sequence[Method]) -> None:
    """Refuse stages of which a later one surely keeps more than an earlier one left: budgets of the same kind that rise.

    A count beside a share can only be judged on an image, which happens when the stage runs.
    """
    before: Method | None = None
    for part in parts:
        keep = getattr(part, "keep", None)
        if before is not None and type(keep) is type(getattr(before, "keep", None)) and keep is not None:
            earlier = before.keep  # type: ignore[attr-defined]
            if not before.adaptive and not part.adaptive and keep > earlier:
                raise FoveateError(
                    f"{format_spec(part)} keeps more than {format_spec(before)} before it leaves; the most is "
                    f"keep={earlier}"
                )
        before = part
