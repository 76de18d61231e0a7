"""The room's public names: all of them resolve, and none of them brings torch or transformers."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys

import pytest

import foveate.cost

PROGRAM = """
import sys, foveate.cost
for name in foveate.cost.__all__:
    getattr(foveate.cost, name)
foveate.cost.shape("mini")
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""


def test_nothing_heavy_is_imported() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """The import system binds a module to its package as soon as it is loaded."""
    modules = {module.name for module in pkgutil.iter_modules(foveate.cost.__path__)}
    assert modules & set(foveate.cost.__all__) == set()


def test_names() -> None:
    assert dir(foveate.cost) == sorted(foveate.cost.__all__)
    with pytest.raises(AttributeError, match="no attribute 'price'"):
        _ = foveate.cost.price
