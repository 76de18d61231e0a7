"""Before the application: who may ask, how much, how many at once and for how long."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from foveate.serve.local.errors import error_body
from foveate.serve.local.limits import Limits
from foveate.serve.local.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/health",)
"""What is answered without a key."""


class Gate:
    """An ASGI application around another.

    Args:
        paths: of the application, for the counts; others are counted as "other".
        key: that clients send as `Authorization: Bearer KEY`, people as the password that their browser asks for; None
            asks for none.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, paths: frozenset[str], key: str | None) -> None:
        self.app, self.limits, self.metrics, self.paths, self.key = app, limits, metrics, paths, key
        self.in_hand = 0
        metrics.watch(lambda: self.in_hand)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            await self._admit(scope, receive, answer)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.counted(path, answer.status or 499)  # 499: the client left before anything was sent

    async def _admit(self, scope: Message, receive: Receive, answer: _Answer) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        closed = self.key is not None and scope["path"] not in OPEN
        if closed and not hmac.compare_digest(_key_of(headers), str(self.key).encode()):
            ask = {} if scope["path"] in self.paths else {"www-authenticate": 'Basic realm="the key as password"'}
            await answer.error(401, "this server asks for a key: Authorization: Bearer KEY", ask)
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, answer)
            return
        answers = scope["path"] in self.paths  # what belongs to a page takes no turn of the model
        if answers and self.in_hand > self.limits.queue:
            waiting = f"{self.in_hand - 1} requests wait, and the most is {self.limits.queue}; try again later"
            await answer.error(429, waiting, {"retry-after": "1"})
            return
        self.in_hand += answers
        try:
            async with asyncio.timeout(self.limits.timeout):
                body = await self._body(headers, receive, answer)
                if body is not None:
                    await self._run(scope, body, receive, answer)
        except TimeoutError:
            await answer.error(504, f"no answer within {self.limits.timeout:g} s, the most that this server takes")
        finally:
            self.in_hand -= answers

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, answer: _Answer) -> bytes | None:
        """The whole body; None where it is too large, or its client has gone."""
        most, length = self.limits.max_body, headers.get(b"content-length", b"0")
        body = bytearray()
        more = not (length.isdigit() and int(length) > most)
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > most:
                break
            more = message.get("more_body", False)
            if not more:
                return bytes(body)
        await answer.error(413, f"a request of more than {most} bytes", {"connection": "close"})
        return None

    async def _run(self, scope: Message, body: bytes, receive: Receive, answer: _Answer) -> None:
        """Let the application answer, until it has, or its client has gone."""
        gone = asyncio.Event()
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            if whole:
                return whole.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work, ear = asyncio.ensure_future(self.app(scope, again, answer)), asyncio.ensure_future(listen())
        try:
            await asyncio.wait({work, ear}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, ear):
                task.cancel()
            await asyncio.gather(work, ear, return_exceptions=True)


def _key_of(headers: dict[bytes, bytes]) -> bytes:
    """The key that a client sent: as a bearer, or, as browsers ask people for one, as the password of any name.

    A browser adds the password to what pages of other hosts send as well; that is as good as none.
    """
    kind, _, sent = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"basic":
        if headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none"):
            return b""
        try:
            return base64.b64decode(sent, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return sent if kind == b"Bearer" else b""


class _Answer:
    """`send`, which knows what has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self._streams = self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self._ended = True
        await self._send(message)

    async def error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """Answer with an error, or end a stream with one; nothing once an answer is whole."""
        body = json.dumps(error_body(status, message)).encode()
        if self._ended:
            return
        if self.status is None:
            sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
            pairs = [(name.encode(), value.encode()) for name, value in sent.items()]
            await self({"type": "http.response.start", "status": status, "headers": pairs})
            await self({"type": "http.response.body", "body": body})
        elif self._streams:
            await self({"type": "http.response.body", "body": b"data: " + body + b"\n\n"})
