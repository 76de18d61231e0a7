"""HTML from elements: whatever is not an element already is escaped, so that no text of a user can become one."""

from __future__ import annotations

from html import escape
from typing import TypeAlias

VOID = {"meta", "br", "hr"}
"""Elements of HTML without an end."""


class Markup(str):
    """Text that is HTML; every other text is shown as it is."""


Child: TypeAlias = "Markup | str | int | float | None"


def element(name: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """An element with its children, and its attributes in double quotes; those that are None are left out.

    An underscore at an attribute's end keeps it from being a word of Python, others are hyphens.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Elements and texts behind each other; None is nothing."""
    return Markup("".join(_written(child) for child in children if child is not None))


def _written(child: Child) -> str:
    return child if isinstance(child, Markup) else escape(str(child))
