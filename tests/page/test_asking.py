"""Asking a server in the same process: through its gate, with its limits, and leaving as a client leaves."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from models import tiny
from serve.local.running import slowed

from foveate import prune
from foveate.core import FoveateError
from foveate.inference.answers import answer
from foveate.inference.loading import Loaded
from foveate.page.asking import Asked, ask
from foveate.scenes import generator
from foveate.serve.local.limits import Limits
from foveate.serve.local.server import application

QUESTION = "how many objects ?"


def png() -> bytes:
    stream = io.BytesIO()
    generator.demo().image(0).save(stream, "PNG")
    return stream.getvalue()


async def whole(app: Any, *given: Any, **more: Any) -> Asked:
    return [one async for one in ask(app, *given, **more)][-1]


def test_the_answer_and_what_was_done(mini: Loaded) -> None:
    with prune(mini.model, "fopru:keep=64", processor=mini.processor) as trace:
        wanted = answer(mini.model, mini.processor, [generator.demo().image(0)], [QUESTION])[0]
    app = application(mini, key="K")
    asked = asyncio.run(whole(app, png(), QUESTION, "fopru:keep=64", key="K"))
    assert asked.text.strip() == wanted
    assert asked.told["visual_tokens"] == {"before": 576, "after": 64.0}
    assert asked.job is not None and asked.job.call is not None
    stage = asked.job.call.images[0].stages[0]
    assert stage.kept.tolist() == trace.images[0].kept.tolist()
    assert stage.scores is not None and stage.scores.shape == (576,)


def test_the_server_refuses_in_its_words(mini: Loaded) -> None:
    app = application(mini, limits=Limits(max_body=1000), key="K")
    with pytest.raises(FoveateError, match="a request of more than 1000 bytes"):
        asyncio.run(whole(app, png(), QUESTION, "none", key="K"))
    with pytest.raises(FoveateError, match="asks for a key"):
        asyncio.run(whole(app, png(), QUESTION, "none"))
    with pytest.raises(FoveateError, match="did you mean 'fopru'"):
        asyncio.run(whole(application(mini), png(), QUESTION, "fopro"))


def test_whoever_stops_listening_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = slowed(monkeypatch)
    app = application(Loaded("tiny", model, tiny.processor(model)), limits=Limits(max_new_tokens=450))

    async def leave() -> None:
        parts = ask(app, png(), "w7", "none")
        await anext(parts)
        await parts.aclose()
        assert app.in_hand == 0

    asyncio.run(leave())
    assert len(steps) < 200
