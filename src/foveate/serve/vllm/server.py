"""vLLM's OpenAI server with a spec, and the last question of a chat sent along with its pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from foveate.serve.vllm import options
from foveate.serve.vllm.asked import QUESTION
from foveate.serve.vllm.rooms import FoveateError

_OVERRIDES = "--hf-overrides"


def arguments(source: str, spec: str, more: Sequence[str], *, name: str, **settings: Any) -> list[str]:
    """The command line of vLLM's server.

    Args:
        source: folder or hub id of the model.
        spec: of the engine.
        more: vLLM's own options, as they were written.
        name: what clients call the model.
        settings: as `options` takes them.

    Raises:
        FoveateError: the spec is unknown, or vLLM is not there; --hf-overrides is no JSON object.
    """
    rest, overrides = _without_overrides(list(more))
    made = options(source, spec, hf_overrides=overrides, **settings)
    given = ["--model", made["model"], _OVERRIDES, json.dumps(made["hf_overrides"])]
    if not any(one.partition("=")[0] == "--served-model-name" for one in rest):
        given += ["--served-model-name", name]
    return [*given, *rest]


def _without_overrides(more: list[str]) -> tuple[list[str], dict[str, Any]]:
    """vLLM's options without --hf-overrides, and what that says."""
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    while more:
        one = more.pop(0)
        name, equals, value = one.partition("=")
        if name.replace("_", "-") != _OVERRIDES:
            rest.append(one)
            continue
        text = value if equals else (more.pop(0) if more else "")
        try:
            overrides = json.loads(text)
        except json.JSONDecodeError as error:
            raise FoveateError(f"{_OVERRIDES} {text!r} is no JSON: {error}") from error
        if not isinstance(overrides, dict):
            raise FoveateError(f"{_OVERRIDES} {text!r} is no JSON object")
    return rest, overrides


def with_question(body: dict[str, Any]) -> dict[str, Any]:
    """A chat request whose pictures are asked about by the text of its last user message, unless it says by what."""
    given = body.get("mm_processor_kwargs") or {}
    question = _last_question(body.get("messages"))
    if not isinstance(given, dict) or QUESTION in given or not question:
        return body
    return {**body, "mm_processor_kwargs": {**given, QUESTION: question}}


def _last_question(messages: Any) -> str:
    """The text of the last message of a user; empty where there is none."""
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content.strip()
            parts = content if isinstance(content, list) else []
            texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
            return " ".join(text.strip() for text in texts if isinstance(text, str)).strip()
    return ""


class QuestionMiddleware:
    """An ASGI application before vLLM's: adds the question to chat requests, and hands all others on as they are."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/chat/completions"):
            await self.app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                await self.app(scope, _once(message, receive), send)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            asked = json.loads(body)
            changed = with_question(asked) if isinstance(asked, dict) else asked
            written = body if changed is asked else json.dumps(changed).encode()
        except ValueError:
            written = body  # vLLM says what is wrong with it
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(written)).encode())]}
        whole = {"type": "http.request", "body": written, "more_body": False}
        await self.app(scope, _once(whole, receive), send)


def _once(first: dict[str, Any], rest: Any) -> Any:
    """`receive` that gives one message again before it asks for more."""
    given = [first]

    async def receive() -> Any:
        return given.pop() if given else await rest()

    return receive


def serve(given: Sequence[str]) -> None:
    """Run the server until it is stopped.

    Args:
        given: as `arguments` makes them.
    """
    from vllm.entrypoints.launchers.api_server.entry import main

    middleware = f"{QuestionMiddleware.__module__}.{QuestionMiddleware.__name__}"
    # `vllm serve` asks for a distribution of that name, which the build for CPUs is not; what it runs does not.
    sys.argv = ["foveate serve", *given, "--middleware", middleware]
    main()
