"""The page over HTTP, without a browser: what it serves, to whom, and which files it will not touch."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page is tested by make test-serve, in an environment of its own")

from page.conftest import SPEC
from serve.local.running import running

from foveate.inference.loading import Loaded
from foveate.page.mounting import mount
from foveate.serve.local.server import application


def get(address: str, path: str, **headers: str) -> tuple[int, Any, bytes]:
    request = urllib.request.Request(address + path, headers={name.replace("_", "-"): v for name, v in headers.items()})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_browsers_are_told_to_load_nothing_from_elsewhere(address: str) -> None:
    status, headers, body = get(address, "/")
    assert status == 200 and b"<html" in body
    assert headers["content-security-policy"].startswith("default-src 'self' data: blob:;")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=https://example.org",
        "/gradio_api/file=https://example.org/a.png",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/runs",
        "/monitoring",
        "/login",
    ],
)
def test_what_a_page_has_no_use_for_is_not_there(address: str, path: str) -> None:
    assert get(address, path)[0] == 404


def test_files_of_the_server_are_not_served(address: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    status, _, body = get(address, f"/gradio_api/file={tmp_path}/secret.png")
    assert status == 403 and b"secret\n" not in body


@pytest.mark.parametrize("where", ["here", "https://example.org/a.png"])
def test_a_question_names_no_file_but_one_that_came_through_the_page(
    address: str, mini: Loaded, tmp_path: Path, where: str
) -> None:
    """What a browser sends when Ask is pressed, with a path that no browser was given."""
    from PIL import Image

    Image.new("RGB", (336, 336)).save(tmp_path / "other.png")
    config = json.loads(get(address, "/config")[2])
    names = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
    number = next(
        one["id"] for one in config["dependencies"] if one["targets"] and one["targets"][0] == [names["go"], "click"]
    )
    path = str(tmp_path / "other.png") if where == "here" else where
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [picture, "how many objects ?", "fopru", 25, "h100"], "fn_index": number, "session_hash": "s"}
    request = urllib.request.Request(f"{address}/gradio_api/queue/join", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    urllib.request.urlopen(request).close()
    events = get(address, "/gradio_api/queue/data?session_hash=s")[2].decode()
    assert "no file that came through the page" in events
    assert '"success": true' not in events.replace('"success":true', '"success": true')


def test_a_browser_is_asked_for_the_key(mini: Loaded) -> None:
    def basic(key: str) -> str:
        return "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()

    with running(mount(application(mini, SPEC, key="a:key"), mini, SPEC, "a:key", None)) as address:
        status, headers, _ = get(address, "/")
        assert status == 401 and headers["www-authenticate"].startswith("Basic")
        assert get(address, "/", Authorization=basic("wrong"))[0] == 401
        assert get(address, "/", Authorization="Basic !")[0] == 401
        assert get(address, "/", Authorization=basic("a:key"))[0] == 200
        assert get(address, "/", Authorization=basic("a:key"), Sec_Fetch_Site="cross-site")[0] == 401
        assert get(address, "/v1/models", Authorization="Bearer a:key")[0] == 200
        assert "www-authenticate" not in get(address, "/v1/models")[1]
