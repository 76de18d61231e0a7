"""Which method runs on which family of models, and why not where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from foveate import methods
from foveate.families import FAMILIES, Family
from foveate.runtime.support import why_not


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: its name.
        reasons: by family, why it cannot run there; None where it can.
    """

    method: str
    reasons: dict[str, str | None]


def support() -> list[Row]:
    """Every method on every family, with the encoder that the family usually has."""
    return [Row(name, {family.name: _reason(name, family) for family in FAMILIES}) for name in methods.names()]


def _reason(name: str, family: Family) -> str | None:
    """The first reason that one of the method's parts meets."""
    tower = family.described(family.towers[0])
    reasons = [why_not(part, family, tower) for part in methods.get(name).example().parts()]
    return next((reason for reason in reasons if reason is not None), None)


def markdown() -> str:
    """The table for the documentation: yes, or the number of the reason below."""
    rows = support()
    numbers: dict[str, int] = {}
    for row in rows:
        for reason in filter(None, row.reasons.values()):
            numbers.setdefault(_general(reason), len(numbers) + 1)
    names = [family.name for family in FAMILIES]
    lines = [f"| method | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in rows:
        cells = ["yes" if why is None else f"no ({numbers[_general(why)]})" for why in row.reasons.values()]
        lines.append(f"| `{row.method}` | {' | '.join(cells)} |")
    reasons = [f"{number}. The method {reason}." for reason, number in numbers.items()]
    return "\n".join([*lines, "", *reasons, ""])


def families_markdown() -> str:
    """What is known of each family: checkpoints, what one image is, videos, and the transformers it needs."""
    lines = ["| family | checkpoints | one image is | videos | transformers |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        models = ", ".join(f"`{name}`" for name in family.hub_ids)
        videos = "no" if family.videos is None else "yes"
        lines.append(f"| {family.name} | {models} | {family.image} | {videos} | >= {family.transformers} |")
    return "\n".join([*lines, ""])


def _general(reason: str) -> str:
    """A reason without the names of the family and its encoder, so that families share one."""
    for family in FAMILIES:
        for tower in family.towers:
            reason = reason.replace(f"{family.name} with {tower}", "the family's encoder")
        reason = reason.replace(f"which {family.name} does not", "which the family does not")
        reason = reason.replace(f"projector of {family.name} takes", "projector of the family takes")
    return reason
