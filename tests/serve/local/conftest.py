"""One `mini` for all tests of the server, and scenes to ask about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serve.local.running import running

from foveate.evaluate.scenes_task import Sample, draw_samples
from foveate.inference.loading import Loaded, load
from foveate.serve.local.server import application

SPEC = "fopru:keep=0.25"


@pytest.fixture(scope="session")
def mini() -> Loaded:
    return load("mini", device="cpu", dtype="float32")  # in which every CPU is fast


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return list(draw_samples(10, seed=5))


@pytest.fixture(scope="module")
def address(mini: Loaded) -> Iterator[str]:
    with running(application(mini, SPEC)) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made
