"""`foveate serve --engine vllm`: answers, counts and errors as a client of OpenAI's interface sees them."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from references.vllm_answers import LONGEST, MINI, QUESTIONS

from foveate.evaluate.scenes_task import draw_samples

SAMPLES = list(draw_samples(QUESTIONS, seed=3))[:3]
PATIENCE = 600  # seconds until the server must answer


@pytest.fixture(scope="module")
def server(launched: Any) -> str:
    """Address of a server of `mini`, as a user starts it, once it answers."""
    until = time.monotonic() + PATIENCE
    while True:
        assert launched.process.poll() is None and time.monotonic() < until, launched.log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{launched.address}/health", timeout=5).close()
            return launched.address
        except OSError:
            time.sleep(0.5)


def ask(server: str, sample: Any, pictures: int = 1, **more: Any) -> dict[str, Any]:
    """The server's answer about a scene, or its error."""
    held = io.BytesIO()
    sample.image.save(held, "PNG")
    url = "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
    picture = {"type": "image_url", "image_url": {"url": url}}
    content = [*[picture] * pictures, {"type": "text", "text": sample.question}]
    body = {"model": "mini", "messages": [{"role": "user", "content": content}], "temperature": 0, **more}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        json.dumps({"max_tokens": LONGEST, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return {"status": answer.status, **json.load(answer)}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "message": error.read().decode()}


@pytest.mark.parametrize("spec", [None, MINI[2], MINI[4], "none"])
def test_answers_and_counts(spec: str | None, server: str, reference: Callable[[str], Any]) -> None:
    more: dict[str, Any] = {} if spec is None else {"mm_processor_kwargs": {"foveate": spec}}
    if spec == MINI[2]:
        more = {"foveate": spec}  # as the server without an engine takes it
    for sample, right in zip(SAMPLES, reference("mini")[spec or MINI[0]], strict=False):
        answer = ask(server, sample, **more)
        assert answer["status"] == 200, answer
        assert answer["choices"][0]["message"]["content"].strip() == right["text"]
        assert answer["usage"]["prompt_tokens"] == right["length"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fopruu:keep=64", "unknown method 'fopruu'"),
        ("fopru:kep=64", "has no field 'kep'"),
        ("h2o", "on the cache"),
        ("divprune:keep=64", "may name: cdpruner, fopru, visionzip"),
    ],
)
def test_a_bad_spec_is_the_clients_error(spec: str, message: str, server: str) -> None:
    answer = ask(server, SAMPLES[0], mm_processor_kwargs={"foveate": spec})
    assert answer["status"] == 400 and message in answer["message"]
    assert ask(server, SAMPLES[0])["status"] == 200


def test_two_specs_are_the_clients_error(server: str) -> None:
    answer = ask(server, SAMPLES[0], foveate="none", mm_processor_kwargs={"foveate": MINI[0]})
    assert answer["status"] == 400 and "give one of them" in answer["message"]


def test_more_pictures_than_allowed_are_the_clients_error(server: str) -> None:
    answer = ask(server, SAMPLES[0], pictures=2)
    assert answer["status"] == 400 and "At most 1 image(s) may be provided" in answer["message"]
    assert ask(server, SAMPLES[0])["status"] == 200


def test_other_settings_of_a_request_are_refused(server: str) -> None:
    answer = ask(server, SAMPLES[0], mm_processor_kwargs={"size": {"shortest_edge": 9000}})
    assert answer["status"] == 400 and "may hold 'foveate' and 'question', not size" in answer["message"]
