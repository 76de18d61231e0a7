"""Foveate prunes the visual tokens of multimodal LLMs. Public names only, imported when first used."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.core import Block as Block
    from foveate.core import Budget as Budget
    from foveate.core import CacheSelection as CacheSelection
    from foveate.core import FoveateError as FoveateError
    from foveate.core import Method as Method
    from foveate.core import Scorer as Scorer
    from foveate.core import Selection as Selection
    from foveate.core import Signals as Signals
    from foveate.core import Trace as Trace
    from foveate.draw import draw as draw
    from foveate.methods.fopru import FoPru as FoPru
    from foveate.methods.pool import Pool as Pool
    from foveate.methods.random import Random as Random
    from foveate.methods.uniform import Uniform as Uniform
    from foveate.prune import prune as prune
    from foveate.runtime.handle import Handle as Handle

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
    "calibrate": "calibrate",
    "Handle": "runtime.handle",
    "prune": "prune",
    "draw": "draw",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"foveate.{_HOMES[name]}"), name)
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


class _Front(ModuleType):
    """This package: `foveate.prune` and `foveate.draw` are the verbs, whoever imports the modules of the same names."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds a submodule to its package as soon as it is loaded.
        verb = isinstance(value, ModuleType) and _HOMES.get(name) == name
        super().__setattr__(name, getattr(value, name) if verb else value)


sys.modules[__name__].__class__ = _Front
