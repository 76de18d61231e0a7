"""One paper per file; the file's name is the method's public name, and there is no list to keep."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from foveate.core import FoveateError, Method, did_you_mean, short
from foveate.forms import Scorer

ENTRY_POINTS = "foveate.methods"


@cache
def names() -> tuple[str, ...]:
    """Public names of every method: the files of this folder and the entry points of other packages."""
    shipped = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return tuple(sorted(shipped | {point.name for point in entry_points(group=ENTRY_POINTS)}))


@cache
def get(name: str) -> type[Method]:
    """The method class of a public name.

    Raises:
        FoveateError: no method has this name.
    """
    if name not in names():
        raise FoveateError(f"unknown method {short(repr(name))}; {did_you_mean(name, names())}")
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return _checked(name, point.load())
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    public = [value for value in found if not value.__name__.startswith("_")]
    if len(public) != 1:
        raise FoveateError(f"methods/{name}.py has {len(public)} public methods; one file holds exactly one")
    return public[0]


def name_of(method: Method | type[Method]) -> str:
    """The public name of a method: its file's or its entry point's; the class name in lower case without either."""
    kind = method if isinstance(method, type) else type(method)
    last = kind.__module__.rpartition(".")[2]
    if last in names() and get(last) is kind:
        return last
    for point in entry_points(group=ENTRY_POINTS):
        # Only an entry point whose class is called the same is worth loading.
        if point.value.endswith(f":{kind.__qualname__}") and get(point.name) is kind:
            return point.name
    return kind.__name__.lower()


def by_class_name(name: str) -> type[Method] | None:
    """The method whose class is called `name`, found by its file's name alone (FoPru in fopru.py)."""
    for known in names():
        if known.replace("_", "") == name.lower():
            kind = get(known)
            if kind.__name__ == name:
                return kind
    return None


def summary(kind: type[Method]) -> str:
    """What the method keeps and why: the first line of its docstring after the name."""
    first = (kind.__doc__ or "").strip().partition("\n")[0]
    return first.partition(": ")[2] or first


def _checked(name: str, loaded: object) -> type[Method]:
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise FoveateError(f"entry point {name!r} of group {ENTRY_POINTS} is {loaded!r}, not a Method class")
    return loaded


__all__ = ["Method", "Scorer", "by_class_name", "get", "name_of", "names", "summary"]
