"""vLLM's OpenAI server with a spec, and the last question of a chat sent along with its pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from foveate.serve.vllm import options
from foveate.serve.vllm.asked import QUESTION, SPEC
from foveate.serve.vllm.rooms import FoveateError, short

_OVERRIDES = "--hf-overrides"
_TRUST = "--trust-request-mm-kwargs"
_TRUSTED = f"start the server with {_TRUST} where clients are trusted with all of them"


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


def with_spec(body: dict[str, Any]) -> dict[str, Any]:
    """A chat request whose spec may stand in a field of its own, as the server without an engine takes it.

    Raises:
        FoveateError: it names two.
    """
    if SPEC not in body:
        return body
    rest, given = {name: value for name, value in body.items() if name != SPEC}, body.get("mm_processor_kwargs") or {}
    if not isinstance(given, dict):
        return rest  # vLLM says what is wrong with it
    if given.get(SPEC, body[SPEC]) != body[SPEC]:
        raise FoveateError(
            f"a request names {short(repr(body[SPEC]))} in {SPEC!r} and {short(repr(given[SPEC]))} in "
            "mm_processor_kwargs; give one of them"
        )
    return {**rest, "mm_processor_kwargs": {**given, SPEC: body[SPEC]}}


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


def untrusted(body: Any) -> str | None:
    """Why a request is refused: it sets more of how pictures are prepared than how they are pruned; None for others.

    vLLM takes such settings from all clients or from none.
    """
    if isinstance(body, list):
        return next((why for one in body if (why := untrusted(one))), None)
    if not isinstance(body, dict):
        return None
    given = body.get("mm_processor_kwargs") or {}
    others = sorted(set(given) - {SPEC, QUESTION}) if isinstance(given, dict) else ["no object"]
    if others:
        return f"mm_processor_kwargs may hold {SPEC!r} and {QUESTION!r}, not {', '.join(others)}; {_TRUSTED}"
    if body.get("media_io_kwargs"):
        return f"media_io_kwargs are not taken from a request; {_TRUSTED}"
    return untrusted([one for one in body.values() if isinstance(one, dict | list)])


class RequestMiddleware:
    """An ASGI application before vLLM's: spec and question of a chat go where vLLM takes them, and settings of clients
    that are not trusted are refused.

    All other requests are handed on as they are.
    """

    trusting = False

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
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
        except ValueError:
            asked = None  # vLLM says what is wrong with it
        refused = None if self.trusting else untrusted(asked)
        if refused is not None:
            await _refuse(send, refused)
            return
        if isinstance(asked, dict) and scope["path"].endswith("/chat/completions"):
            try:
                changed = with_question(with_spec(asked))
            except FoveateError as error:
                await _refuse(send, str(error))
                return
            body = body if changed is asked else json.dumps(changed).encode()
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        whole = {"type": "http.request", "body": body, "more_body": False}
        await self.app(scope, _once(whole, receive), send)


class TrustingMiddleware(RequestMiddleware):
    """The same where clients are trusted with all settings."""

    trusting = True


async def _refuse(send: Any, message: str) -> None:
    """Answer with HTTP 400, as vLLM does."""
    error = {"message": message, "type": "BadRequestError", "param": "mm_processor_kwargs", "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


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

    trusted = any(one.replace("_", "-") == _TRUST for one in given)
    kind = TrustingMiddleware if trusted else RequestMiddleware
    more = ["--middleware", f"{kind.__module__}.{kind.__name__}", *([] if trusted else [_TRUST])]
    # `vllm serve` asks for a distribution of that name, which the build for CPUs is not; what it runs does not.
    sys.argv = ["foveate serve", *given, *more]
    main()
