"""A server on this machine's own address, in a thread, and what tests send it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from models import tiny
from PIL import Image


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a server that runs until the block ends."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def slowed(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    """A tiny model that never ends an answer by itself, 20 ms and an entry of the list a step."""
    model = tiny.model()
    steps: list[int] = []
    forward = model.forward

    def slow(*given: Any, **options: Any) -> Any:
        steps.append(1)
        time.sleep(0.02)
        return forward(*given, **options)

    monkeypatch.setattr(model, "forward", slow)
    return model, steps


def data_url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def asked(question: str, *pictures: Image.Image) -> list[dict[str, Any]]:
    """The messages of one question about some pictures."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
