"""What a server refuses: in OpenAI's form, with our message, before the model hears of it."""

from __future__ import annotations

import base64
import json
import socket
import urllib.error
import urllib.request
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serve.local.running import asked, data_url, running

from foveate.core import FoveateError
from foveate.evaluate.scenes_task import Sample
from foveate.inference.loading import Loaded
from foveate.serve.local import pictures
from foveate.serve.local.bodies import CHAT, RESPONSES
from foveate.serve.local.handlers import Desk
from foveate.serve.local.limits import Limits
from foveate.serve.local.metrics import Metrics
from foveate.serve.local.pictures import read_picture
from foveate.serve.local.server import application

WHITE = Image.new("RGB", (336, 336), "white")


def post(address: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    """The HTTP status of a request and its JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def url_of(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def about(url: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


PLAIN = {"messages": [{"role": "user", "content": "how many objects are there"}]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "needs 'messages'"),
        ({**PLAIN, "foveate": "fopro"}, "did you mean 'fopru'"),
        ({**PLAIN, "foveate": 3}, 'is no text; write "fopru:keep=0.25"'),
        ({**PLAIN, "foveate": "fopru:keep=2.0"}, "keep=2.0"),
        ({**PLAIN, "foveate": "@spec.json"}, "names a file of the server"),
        ({**PLAIN, "foveate": "lvpruning: from = /etc"}, "names a file of the server"),
        ({**PLAIN, "foveate": "fopru:keep=64+lvpruning:keep=0.5/0.3/0.1,path=/etc"}, "names a file of the server"),
        ({**PLAIN, "model": "other"}, "there is no model 'other' here; mini is the one"),
        ({**PLAIN, "n": 2}, "n=2 is not served here"),
        ({**PLAIN, "generation_config": "{}"}, "no field 'generation_config'"),
        ({**PLAIN, "max_token": 3}, "did you mean 'max_tokens'"),
        ({**PLAIN, "max_tokens": 513}, "the most is 512"),
        ({**PLAIN, "max_tokens": 0}, "the smallest is 1"),
        ({**PLAIN, "max_tokens": "7"}, "no number of tokens"),
        ({**PLAIN, "temperature": 3}, "no number from 0 to 2"),
        ({**PLAIN, "top_p": True}, "no number from 0 to 1"),
        ({**PLAIN, "seed": 0.5}, "no whole number"),
        ({**PLAIN, "stream": "yes"}, "neither true nor false"),
        ({**PLAIN, "stop": [""]}, "stop is no text"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [3]}, "messages[0] is no object"),
        ({"messages": [{"content": "x"}]}, "role=None is not served"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "choices: system, developer, user, assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "neither a text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "choices: text, image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text is no text"),
        ({"messages": [{"role": "user", "content": "see <image> here"}]}, "<image>"),
        (about(3), "holds no url"),
        (about("data:image/png,xyz"), "not in base64"),
        (about("data:image/png;base64,!!"), "no base64"),
        (about(url_of(b"no picture")), "messages[0].content[0] is no picture that can be decoded"),
        (about("file:///etc/passwd"), "is no data URL"),
        (about("/etc/passwd"), "is no data URL"),
        (about("https://example.org/a.png"), "fetches no pictures"),
        ({"messages": asked("x", *[WHITE] * 17)}, "17 pictures in a request; the most is 16"),
        ({"messages": asked("x", *[WHITE] * 8)}, "the context of this decoder has 1024"),
        (b"[]", "one JSON object"),
        (b"{", "one JSON object"),
    ],
)
def test_a_bad_request_is_told_why(address: str, body: Any, message: str) -> None:
    status, told = post(address, body)
    assert status == 400
    assert message in told["error"]["message"]
    assert told["error"]["type"] == "invalid_request_error" and "Traceback" not in json.dumps(told)


def test_a_picture_that_announces_too_much_is_not_decoded(address: str) -> None:
    import io

    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    status, told = post(address, about(url_of(stream.getvalue())))
    assert status == 400 and "81.00 megapixels; the most is 64" in told["error"]["message"]


@pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/audio/transcriptions", "/v1/completions", "/nowhere"])
def test_what_a_server_of_one_model_has_no_use_for_is_not_there(address: str, path: str) -> None:
    assert post(address, {}, path)[0] == 404
    assert post(address, {}, path)[1]["error"]["type"] == "not_found_error"


def test_no_page_of_another_host_may_ask(address: str) -> None:
    request = urllib.request.Request(f"{address}/v1/models", headers={"Origin": "https://example.org"})
    with urllib.request.urlopen(request) as reply:
        assert "access-control-allow-origin" not in {name.lower() for name in reply.headers}


def test_a_failure_tells_no_traceback_and_the_server_lives_on(
    mini: Loaded, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    from openai import OpenAI

    def fail(**_options: Any) -> None:
        raise RuntimeError('a "quoted" secret')

    body = {"messages": asked("how many objects are there", samples[0].image)}
    with running(application(mini)) as address:
        with monkeypatch.context() as patched:
            patched.setattr(mini.model, "generate", fail)
            status, told = post(address, body)
            assert status == 500
            assert told["error"]["message"] == "the server failed at this request; its log says why"
            client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            with pytest.raises(Exception, match="its log says why"):
                list(client.chat.completions.create(model="mini", stream=True, **body))
        assert post(address, body)[0] == 200


def test_a_key(mini: Loaded) -> None:
    with running(application(mini, key="secret")) as address:
        assert post(address, PLAIN)[0] == 401
        assert post(address, PLAIN, Authorization="Bearer wrong")[0] == 401
        assert post(address, PLAIN, Authorization="Bearer secret")[0] == 200
        with urllib.request.urlopen(f"{address}/health") as reply:
            assert reply.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/v1/models")


def test_the_longest_prompt(mini: Loaded) -> None:
    with running(application(mini, limits=Limits(max_prompt_tokens=100))) as address:
        status, told = post(address, {"messages": asked("how many objects are there", WHITE)})
        assert status == 400 and "tokens; the most is 100" in told["error"]["message"]
        assert post(address, PLAIN)[0] == 200


def test_a_spec_that_cannot_run_is_refused_before_the_server_starts(mini: Loaded) -> None:
    with pytest.raises(FoveateError, match="lvpruning"):
        application(mini, "lvpruning:keep=0.5/0.3/0.1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_body", 0),
        ("max_images", -1),
        ("max_new_tokens", 0),
        ("queue", -1),
        ("max_prompt_tokens", 0),
        ("timeout", 0),
    ],
)
def test_limits_that_leave_nothing(field: str, value: int) -> None:
    with pytest.raises(FoveateError, match=f"{field}={value}"):
        Limits(**{field: value})


# ---------------------------------------------------------------------------------------------------------------------
# whatever is sent

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "image_url", "url"]) | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
_FIELDS = st.sampled_from(
    "messages input instructions model stream temperature top_p seed stop foveate n max_tokens max_output_tokens "
    "logprobs response_format user".split()
)


@settings(max_examples=150)
@given(st.dictionaries(_FIELDS | st.text(max_size=4), _VALUES, max_size=4))
def test_any_body_is_taken_or_refused_in_words(mini: Loaded, body: dict[str, Any]) -> None:
    desk = _DESKS.setdefault(id(mini), Desk(mini, "none", Limits(), Metrics()))
    for interface in (CHAT, RESPONSES):
        try:
            taken, _ = desk.take(body, interface)
        except FoveateError:
            continue
        assert interface.content in taken


_DESKS: dict[int, Desk] = {}


# ---------------------------------------------------------------------------------------------------------------------
# pictures from elsewhere


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_given, **_more: found)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "192.168.0.9", "169.254.169.254", "::1", "fd00::1", "0.0.0.0", "100.64.0.1"]
)
def test_no_host_inside_is_asked(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    resolve(monkeypatch, "8.8.8.8", address)
    with pytest.raises(FoveateError, match="no public host"):
        read_picture("https://example.org/a.png", "messages[0]", urls=True)


@pytest.mark.parametrize("url", ["http://example.org/a.png", "https://user:word@example.org/", "https:///a.png"])
def test_only_plain_https_is_fetched(url: str) -> None:
    with pytest.raises(FoveateError, match="no plain https address"):
        read_picture(url, "messages[0]", urls=True)


class Elsewhere:
    """A public host that answers with what it is given, one after the other; where it was asked is noted."""

    def __init__(self, *answers: tuple[int, str, bytes]) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, host: str, port: int, address: str) -> Any:
        status, location, data = self.answers.pop(0)
        self.asked.append((host, address))
        parts = [data[:10], data[10:], b""]
        reply = SimpleNamespace(status=status, getheader=lambda _name: location, read1=lambda _most: parts.pop(0))
        return SimpleNamespace(request=lambda *_given: None, getresponse=lambda: reply, close=lambda: None)


def test_a_picture_is_fetched_through_redirects(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    stream = io.BytesIO()
    WHITE.save(stream, "PNG")
    resolve(monkeypatch, "8.8.8.8")
    host = Elsewhere((302, "/b.png", b""), (200, "", stream.getvalue()))
    monkeypatch.setattr(pictures, "_Connection", host)
    assert read_picture("https://example.org/a.png", "x", urls=True).tobytes() == WHITE.tobytes()
    assert host.asked == [("example.org", "8.8.8.8")] * 2


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([(302, "http://example.org/", b"")], "no plain https"),
        ([(302, "file:///etc/passwd", b"")], "no plain https"),
        ([(302, "/again", b"")] * 4, "more than 3 redirects"),
        ([(404, "", b"")], "HTTP 404"),
        ([(200, "", b"\0" * 20_000_011)], "more than 20 MB"),
        ([(200, "", b"nothing to see")], "no picture that can be decoded"),
    ],
)
def test_what_comes_from_elsewhere_is_bounded(
    monkeypatch: pytest.MonkeyPatch, answers: list[tuple[int, str, bytes]], message: str
) -> None:
    resolve(monkeypatch, "8.8.8.8")
    monkeypatch.setattr(pictures, "_Connection", Elsewhere(*answers))
    with pytest.raises(FoveateError, match=message):
        read_picture("https://example.org/a.png", "x", urls=True)


def test_a_data_url_is_read_as_it_is() -> None:
    assert read_picture(data_url(WHITE), "x", urls=False).tobytes() == WHITE.tobytes()
