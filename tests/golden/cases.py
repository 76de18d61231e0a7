"""Golden files as cases: what a method was shown and what its official code answered, one entry per stage.

Each file holds arrays that the code of a paper read and wrote; `index.json` beside them says which are inputs, with
what settings the code ran, and how its answers compare. `PATHS` says where in `Signals` each input array belongs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from golden import attention as golden_attention
from golden import merging as golden_merging
from golden import pixels as golden_pixels
from golden import sets as golden_sets
from golden import staged as golden_staged
from golden import tower as golden_tower
from golden.files import FOLDER, Builder, Case, arrays_of, index_of

from foveate import methods

GROUPS: tuple[ModuleType, ...] = (
    golden_attention,
    golden_merging,
    golden_pixels,
    golden_sets,
    golden_staged,
    golden_tower,
)
"""Each has PATHS, BUILDERS and CHECKS of its methods."""

PATHS: dict[str, dict[str, str]] = {name: paths for group in GROUPS for name, paths in group.PATHS.items()}
"""Where each input array belongs; `_stage2` and later suffixes are left out."""

BUILDERS: dict[str, Builder] = {name: builder for group in GROUPS for name, builder in group.BUILDERS.items()}

CHECKS: dict[str, dict[str, Any]] = {name: checks for group in GROUPS for name, checks in group.CHECKS.items()}
"""How each array that is no input is reproduced; `_stage2` and later suffixes are left out."""

UNCOVERED = frozenset({"clip_probe"})
"""Golden methods that have no builder here."""


def load(folder: str | Path = FOLDER) -> Iterator[Case]:
    """Every case of a folder whose method is registered.

    Raises:
        FileNotFoundError: the folder or a file that its index names is missing.
        LookupError: a registered method has golden files but no builder.
    """
    for entry in index_of(folder):
        name = entry["method"]
        if name in BUILDERS:
            method, signals, expected = BUILDERS[name](entry["hyperparameters"], arrays_of(folder, entry["file"]))
            yield Case(entry["file"], method, signals, expected)
        elif name in methods.names():
            raise LookupError(f"{entry['file']}: method {name!r} is registered, but no builder makes its cases")
