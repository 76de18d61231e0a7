"""Asking methods: where there is nothing to choose from, nobody is asked, in steps or not."""

from __future__ import annotations

import pytest
import torch

from foveate import methods
from foveate.choosing.asking import ask
from foveate.choosing.signals import Prompt, Sources


@pytest.mark.parametrize("name", ["fopru", "hired", "tome"])
def test_no_pictures(name: str) -> None:
    nothing = torch.zeros(0, dtype=torch.bool)
    sources = Sources({}, Prompt(lambda: nothing, nothing), None, torch.device("cpu"))
    assert ask(methods.get(name).example(), [], sources) == []
