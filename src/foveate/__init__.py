"""Foveate prunes the visual tokens of multimodal LLMs. Public names only, imported when first used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.core import (
        Block,
        Budget,
        CacheSelection,
        FoveateError,
        Method,
        Scorer,
        Selection,
        Signals,
        Trace,
    )
    from foveate.draw import draw
    from foveate.methods.fopru import FoPru
    from foveate.methods.pool import Pool
    from foveate.methods.random import Random
    from foveate.methods.uniform import Uniform
    from foveate.prune import Handle, prune

__version__ = "0.1.0"

MINI = str(Path(__file__).parent / "scenes" / "checkpoint")
"""Folder of the small model that ships with the package; `from_pretrained(foveate.MINI)` loads it."""

_HOMES = {
    "Block": "core",
    "Budget": "core",
    "CacheSelection": "core",
    "FoveateError": "core",
    "Method": "core",
    "Scorer": "core",
    "Selection": "core",
    "Signals": "core",
    "Trace": "core",
    "Handle": "prune",
    "prune": "prune",
    "draw": "draw",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module = importlib.import_module(f"foveate.{_HOMES[name]}")
        # The verb replaces the module of the same name, which the import has just bound here.
        value = getattr(module, name)
        globals()[name] = value
        return value
    if name[:1].isupper():
        from foveate import methods

        kind = methods.by_class_name(name)
        if kind is not None:
            globals()[name] = kind
            return kind
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    from foveate import methods

    return sorted([*_HOMES, "MINI", "__version__", *(methods.get(name).__name__ for name in methods.names())])
