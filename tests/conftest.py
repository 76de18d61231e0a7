"""Settings of every test: no hub, fixed seeds, few threads, reproducible hypothesis examples."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import numpy
import pytest
import torch

hypothesis.settings.register_profile(
    "house",
    deadline=None,  # nothing is timed
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny models run one operation after the other: a second thread only costs time


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002 - the library under test may be given nothing newer
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model, processor included."""
    from models import tiny  # loads torch, which not every test needs

    path = tmp_path_factory.mktemp("checkpoint")
    tiny.save(tiny.model(), path)
    return path
