"""The server against its own schema: whatever is sent, it answers or refuses, and never fails."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("schemathesis", reason="make test-serve installs it")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from serve.local.running import running

from foveate.inference.loading import Loaded
from foveate.serve.local.limits import Limits
from foveate.serve.local.server import application

QUESTIONS = ("/v1/chat/completions", "/v1/responses")
EXAMPLES = settings(
    max_examples=60, deadline=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def short(mini: Loaded) -> Iterator[str]:
    """A server whose answers are short."""
    with running(application(mini, "fopru:keep=0.25", limits=Limits(max_new_tokens=4))) as found:
        yield found


@pytest.fixture(scope="module")
def described(short: str) -> Any:
    return schemathesis.openapi.from_url(f"{short}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", QUESTIONS)
def test_nothing_makes_it_fail(path: str, mode: Any, described: Any) -> None:
    """What the schema allows, and what it does not."""
    operation = described[path]["POST"]

    @EXAMPLES
    @given(operation.as_strategy(generation_mode=mode))
    def held(case: Any) -> None:
        case.validate_response(case.call(), checks=[not_a_server_error])

    held()


def sent(address: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("path", QUESTIONS)
def test_its_own_examples_are_answered(path: str, short: str, described: Any) -> None:
    example = described.raw_schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
    status, body = sent(short, path, example)
    assert status == 200 and body["foveate"]["method"] == "fopru:keep=64"


@pytest.mark.parametrize("path", QUESTIONS)
def test_it_names_the_fields_that_are_taken(path: str, short: str, described: Any) -> None:
    """Every field that it names is taken with a value that is allowed; another is refused."""
    content = described.raw_schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    fields = content["schema"]["properties"]
    allowed = {
        "model": "mini",
        "stream": False,
        "temperature": 0,
        "top_p": 1,
        "seed": 3,
        "stop": ["."],
        "foveate": "none",
    }
    allowed |= {"instructions": "be short", **dict.fromkeys((n for n in fields if n.startswith("max_")), 2)}
    whole = {**content["example"], **{name: value for name, value in allowed.items() if name in fields}}
    assert whole.keys() == fields.keys()
    assert sent(short, path, whole)[0] == 200
    assert sent(short, path, {**whole, "another": 1})[0] == 400
