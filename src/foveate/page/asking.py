"""Asks a server in the same process, through its gate as any client would, and hears what was done to the picture."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from foveate.core import FoveateError
from foveate.serve.local.bodies import SPEC
from foveate.serve.local.jobs import WATCHER, Job

PATH = "/v1/chat/completions"


class Asked:
    """One question and its answer so far.

    Attributes:
        text: of the answer.
        told: what the answer tells of itself once it is whole; empty until then.
        job: what the server did; None until it has begun.
    """

    def __init__(self) -> None:
        self.text = ""
        self.told: dict[str, Any] = {}
        self.job: Job | None = None

    def take(self, event: dict[str, Any]) -> None:
        """Take one event of the stream.

        Raises:
            FoveateError: the server tells of an error.
        """
        if "error" in event:
            raise FoveateError(event["error"]["message"])
        for choice in event.get("choices", ()):
            self.text += (choice.get("delta") or {}).get("content") or ""
        self.told = event.get(SPEC, self.told)

    def watch(self, job: Job) -> None:
        """Take the server's own record."""
        self.job = job


async def ask(
    app: Any, picture: bytes, question: str, spec: str | None, key: str | None = None
) -> AsyncGenerator[Asked]:
    """One answer as it grows.

    Args:
        app: an ASGI application, the gate of a server.
        picture: bytes of its file.
        spec: what it is pruned by; "none" for nothing, None for what the server does by itself.

    Raises:
        FoveateError: the server refuses or fails, in its words.
    """
    url = "data:application/octet-stream;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "stream": True, "temperature": 0}
    if spec is not None:
        body[SPEC] = spec
    asked, left = Asked(), b""
    async with aclosing(_posted(app, json.dumps(body).encode(), key, asked)) as parts:
        async for part in parts:
            *events, left = (left + part).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if event != data and data != b"[DONE]":
                    asked.take(json.loads(data))
                    yield asked
    if left:  # no stream: an error by itself
        asked.take(json.loads(left))
    yield asked


async def _posted(app: Any, body: bytes, key: str | None, asked: Asked) -> AsyncGenerator[bytes]:
    """The parts of an answer's body; whoever stops reading them leaves as a client leaves."""
    sent, gone = [body], asyncio.Event()
    parts: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def receive() -> dict[str, Any]:
        if sent:
            return {"type": "http.request", "body": sent.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            parts.put_nowait(message.get("body", b""))

    async def run() -> None:
        WATCHER.set(asked.watch)
        try:
            await app(_scope(key), receive, send)
        finally:
            parts.put_nowait(None)

    work = asyncio.create_task(run())
    try:
        while (part := await parts.get()) is not None:
            yield part
        await work
    finally:
        gone.set()
        await asyncio.gather(work, return_exceptions=True)


def _scope(key: str | None) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
