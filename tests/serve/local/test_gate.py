"""The gate before the application, driven by hand: sizes, places, times, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from foveate.serve.local.gate import Gate
from foveate.serve.local.limits import Limits
from foveate.serve.local.metrics import Metrics

PATH = "/v1/chat/completions"


class Client:
    """One connection: what it sends, whether it is still there, and what it got."""

    def __init__(self, *parts: bytes, length: int | None = None) -> None:
        self.parts = list(parts or (b"{}",))
        self.headers = [] if length is None else [(b"content-length", str(length).encode())]
        self.left = asyncio.Event()
        self.got: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self.parts:
            return {"type": "http.request", "body": self.parts.pop(0), "more_body": bool(self.parts)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.got.append(dict(message))

    async def ask(self, gate: Gate) -> None:
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": self.headers}
        await gate(scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return int(self.got[0]["status"])

    @property
    def text(self) -> str:
        return b"".join(one.get("body", b"") for one in self.got).decode()


class App:
    """An application that answers once it is told to, and knows what became of its requests."""

    def __init__(self, kind: bytes = b"application/json") -> None:
        self.kind = kind
        self.go, self.began = asyncio.Event(), asyncio.Event()
        self.bodies: list[bytes] = []
        self.cancelled = 0

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        self.bodies.append((await receive())["body"])
        if self.kind == b"text/event-stream":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", self.kind)]})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        self.began.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.kind != b"text/event-stream":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", self.kind)]})
        await send({"type": "http.response.body", "body": b"done"})


def gated(app: App, **limits: Any) -> Gate:
    return Gate(app, Limits(**limits), Metrics(), frozenset({PATH}), None)


def counted(gate: Gate, status: int) -> float:
    return gate.metrics.registry.get_sample_value("foveate_requests_total", {"path": PATH, "status": str(status)}) or 0


def test_a_body_comes_whole() -> None:
    async def run() -> None:
        app = App()
        app.go.set()
        client, gate = Client(b"{", b"}"), gated(app)
        await client.ask(gate)
        assert app.bodies == [b"{}"] and client.status == 200 and client.text == "done"
        assert gate.in_hand == 0 and counted(gate, 200) == 1

    asyncio.run(run())


@pytest.mark.parametrize(("parts", "length"), [((b"x" * 11,), 11), ((b"x" * 6, b"x" * 5), None), ((b"x",), 10**12)])
def test_a_body_that_is_too_large(parts: tuple[bytes, ...], length: int | None) -> None:
    async def run() -> None:
        app = App()
        client = Client(*parts, length=length)
        await client.ask(gated(app, max_body=10))
        assert client.status == 413 and app.bodies == []
        assert json.loads(client.text)["error"]["message"] == "a request of more than 10 bytes"

    asyncio.run(run())


def test_one_more_than_may_wait_is_sent_away_and_told_when_to_return() -> None:
    async def run() -> None:
        app = App()
        gate = gated(app, queue=2)
        clients = [Client() for _ in range(4)]
        waiting = [asyncio.ensure_future(client.ask(gate)) for client in clients[:3]]
        await app.began.wait()
        await clients[3].ask(gate)
        assert clients[3].status == 429
        assert (b"retry-after", b"1") in clients[3].got[0]["headers"]
        assert "the most is 2" in clients[3].text
        app.go.set()
        await asyncio.gather(*waiting)
        assert [client.status for client in clients[:3]] == [200] * 3
        await (last := Client()).ask(gate)
        assert last.status == 200

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_place() -> None:
    async def run() -> None:
        app = App()
        client, gate = Client(), gated(app, queue=0)
        asking = asyncio.ensure_future(client.ask(gate))
        await app.began.wait()
        client.left.set()
        await asking
        assert app.cancelled == 1 and gate.in_hand == 0 and client.got == [] and counted(gate, 499) == 1

    asyncio.run(run())


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
def test_an_answer_that_takes_too_long_is_ended(kind: bytes) -> None:
    async def run() -> None:
        app = App(kind)
        client, gate = Client(), gated(app, timeout=0.05)
        await client.ask(gate)
        assert app.cancelled == 1 and gate.in_hand == 0
        assert "no answer within 0.05 s" in client.text
        assert client.status == (504 if kind == b"application/json" else 200)
        assert not client.got[-1].get("more_body")

    asyncio.run(run())


def test_a_body_that_never_ends_is_ended() -> None:
    async def run() -> None:
        app = App()
        client = Client(b"{", b"}")
        client.parts = [b"{", *[b""] * 10**6]
        slow = client.receive

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.01)
            return await slow()

        client.receive = receive  # type: ignore[method-assign]
        await client.ask(gated(app, timeout=0.05))
        assert client.status == 504 and app.bodies == []

    asyncio.run(run())
