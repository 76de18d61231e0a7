"""Which method runs on which family of models, and why not where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from foveate import methods
from foveate.families.family import Family
from foveate.families.rows import FAMILIES
from foveate.runtime.support import first_refused, other_form, why_not


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: its name.
        reasons: by family, why it cannot run there as it is; None where it can.
        settings: by family, with which settings it can all the same; None where there are none or none are needed.
    """

    method: str
    reasons: dict[str, str | None]
    settings: dict[str, str | None]


def support() -> list[Row]:
    """Every method on every family, with the encoder that the family usually has."""
    found = []
    for name in methods.names():
        both = {family.name: _reason(name, family) for family in FAMILIES}
        reasons, settings = ({key: pair[place] for key, pair in both.items()} for place in (0, 1))
        found.append(Row(name, reasons, settings))
    return found


def _reason(name: str, family: Family) -> tuple[str | None, str | None]:
    """Why a method cannot run as it is, and the settings with which it can; what none avoids comes first."""
    tower, method = family.described(family.towers[0]), methods.get(name).example()
    refused = first_refused(method.parts(), family, tower)
    return (None, None) if refused is None else (why_not(refused, family, tower), other_form(method, family, tower))


def markdown() -> str:
    """The table for the documentation: yes, a letter for the settings that it takes, or the number of the reason."""
    rows = support()
    numbers: dict[str, int] = {}
    letters: dict[str, str] = {}
    for row in rows:
        for family, reason in row.reasons.items():
            settings = row.settings[family]
            if settings is not None:
                letters.setdefault(settings, "abcdefgh"[len(letters)])
            elif reason is not None:
                numbers.setdefault(_general(reason), len(numbers) + 1)

    def cell(row: Row, family: str) -> str:
        reason, settings = row.reasons[family], row.settings[family]
        if settings is not None:
            return f"{letters[settings]})"
        return "yes" if reason is None else f"no ({numbers[_general(reason)]})"

    names = [family.name for family in FAMILIES]
    lines = [f"| method | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| `{row.method}` | {' | '.join(cell(row, name) for name in names)} |" for row in rows]
    conditions = [f"{letter}) It runs with `{text}`." for text, letter in letters.items()]
    reasons = [f"{number}. The method {reason}." for reason, number in numbers.items()]
    return "\n".join([*lines, "", "  \n".join(conditions), "", *reasons, ""])


def families_markdown() -> str:
    """What is known of each family: checkpoints, what one image is, videos, and the transformers it needs."""
    lines = ["| family | checkpoints | one image is | videos | transformers |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        models = ", ".join(f"`{name}`" for name in family.hub_ids)
        videos = "yes" if family.videos is not None or family.frames else "no"
        lines.append(f"| {family.name} | {models} | {family.image} | {videos} | >= {family.transformers} |")
    return "\n".join([*lines, ""])


def _general(reason: str) -> str:
    """A reason without the names of the family and its encoder, so that families share one."""
    for family in FAMILIES:
        for tower in family.towers:
            reason = reason.replace(f"{family.name} with {tower}", "the family's encoder")
        reason = reason.replace(f"which {family.name} does not", "which the family does not")
        reason = reason.replace(f"processor of {family.name} makes", "processor of the family makes")
        reason = reason.replace(f"projector of {family.name} takes", "projector of the family takes")
    return reason
