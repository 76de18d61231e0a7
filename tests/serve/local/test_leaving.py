"""Clients that leave, and a server that is told to end: nobody waits for an answer that nobody reads."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from models import tiny
from serve.local.running import running, slowed

from foveate.inference.loading import Loaded
from foveate.serve.local.limits import Limits
from foveate.serve.local.server import application

JSON = {"Content-Type": "application/json"}
LONG = {"messages": [{"role": "user", "content": "w7 w8"}], "max_tokens": 450}
SHORT = {"messages": [{"role": "user", "content": "w7 w8"}], "max_tokens": 2}


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_with_its_client(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = slowed(monkeypatch)
    app = application(Loaded("tiny", model, tiny.processor(model)), limits=Limits(queue=0))
    with running(app) as address:
        host = address.removeprefix("http://")
        leaving = http.client.HTTPConnection(host)
        leaving.request("POST", "/v1/chat/completions", json.dumps({**LONG, "stream": stream}), JSON)
        wait(lambda: bool(steps))
        assert post(host, SHORT)[0] == 429
        assert leaving.sock is not None
        leaving.sock.close()
        wait(lambda: app.in_hand == 0)
        status, told = post(host, SHORT)
        assert status == 200 and told["usage"]["completion_tokens"] == 2
    assert len(steps) < 300


def wait(until: Callable[[], bool]) -> None:
    """Until something holds; a minute is far more than it takes."""
    for _ in range(6000):
        if until():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def post(host: str, body: dict[str, Any]) -> tuple[int, Any]:
    with closing(http.client.HTTPConnection(host)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
        reply = connection.getresponse()
        return reply.status, json.load(reply)


@pytest.mark.skipif(os.name != "posix", reason="signals of other systems end a process at once")
def test_what_runs_is_finished_before_the_server_ends(tmp_path: Path) -> None:
    tiny.save(tiny.model(), tmp_path)
    command = [sys.executable, "-m", "foveate", "serve", str(tmp_path), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        told = next(line for line in server.stderr if "running on http://127.0.0.1:" in line)
        host = told.partition("http://")[2].split()[0]
        connection = http.client.HTTPConnection(host)
        connection.request("POST", "/v1/chat/completions", json.dumps({**LONG, "stream": True}), JSON)
        reply = connection.getresponse()
        reply.readline()
        server.send_signal(signal.SIGTERM)
        rest = reply.read().decode()
        connection.close()
        assert rest.endswith("data: [DONE]\n\n")
        usage = [json.loads(line[6:]) for line in rest.splitlines() if '"usage"' in line][-1]["usage"]
        assert usage["completion_tokens"] == LONG["max_tokens"]
        server.stderr.read()
        assert server.wait(60) in (0, -signal.SIGTERM)
