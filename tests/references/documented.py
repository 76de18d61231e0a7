"""Which method runs on which family, read from the table that the documentation shows: what models are held to."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs" / "families.md"
# Members of a family that its column is not about: why more runs on them than on the usual one, in the table's words,
# and what of that runs there with settings alone, for a reason that the usual one's hides.
_LARGER = {"gemma4/31b": ("not so the 31B", {"vscan": "attention=received"})}


@cache
def _cells() -> dict[str, dict[str, str]]:
    """By method and family: "yes", the settings that it takes ("attention=received"), or the reason why it is refused
    in the words behind "The method"."""
    text = _PAGE.read_text(encoding="utf-8").partition("\n## Methods and families\n")[2].partition("\n## ")[0]
    said = dict(re.findall(r"^([a-z]\)) It runs with `(.*)`\.", text, re.M))
    said |= {f"no ({number})": reason for number, reason in re.findall(r"^(\d+)\. The method (.*)\.$", text, re.M)}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (_, *families), _, *rows = lines
    return {
        name.strip("`"): {family: said.get(cell, cell) for family, cell in zip(families, cells, strict=True)}
        for name, *cells in rows
    }


def cell(method: str, family: str) -> str:
    """What the table says; "yes" of what it does not know yet, so that a refusal there is found."""
    usual = family.partition("/")[0]
    found = _cells().get(method, {}).get(usual, "yes")
    opened, settled = _LARGER.get(family, ("", dict[str, str]()))
    return settled.get(method, "yes") if opened and opened in found else found


def settings(method: str, family: str) -> str | None:
    """With which settings a method runs that does not run as it is; None where it does, or never runs."""
    found = cell(method, family)
    return found if re.fullmatch(r"\w+=\w+(,\w+=\w+)*", found) else None


def served(method: str, family: str) -> bool:
    """Whether a method runs as it is."""
    return cell(method, family) == "yes"


def pairs(names: list[str] | tuple[str, ...], families: list[str] | tuple[str, ...]) -> list[tuple[str, str]]:
    """(method, family) for each family on which a method runs as it is."""
    return [(name, family) for name in names for family in families if served(name, family)]
