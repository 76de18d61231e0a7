"""The room's public names: all of them resolve, and none of them brings torch or transformers."""

from __future__ import annotations

import os
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


def test_names() -> None:
    assert dir(foveate.cost) == sorted(foveate.cost.__all__)
    with pytest.raises(AttributeError, match="no attribute 'price'"):
        _ = foveate.cost.price
