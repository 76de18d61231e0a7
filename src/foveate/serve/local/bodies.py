"""What a client may ask: the fields of a request, checked in words before the model hears of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from foveate.core import FoveateError, did_you_mean, short
from foveate.serve.local.limits import Limits

SPEC = "foveate"
"""The field of a request that says how its pictures are pruned; answers tell under it what that did."""

_PASSED = ("model", "stream", "temperature", "top_p", "seed")
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "stream_options"}
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
}
TEXTS = ("text", "input_text", "output_text")
PICTURES = ("image_url", "input_image")
ROLES = ("system", "developer", "user", "assistant")
COLDEST = 1e-3
"""Below this temperature the likeliest token is taken, as at 0: scores divided by it leave the range of numbers."""
STOPS = 16
"""Texts that end an answer, at most."""


@dataclass(frozen=True)
class Interface:
    """One way of asking, by the names of its fields."""

    content: str
    longest: tuple[str, ...]
    more: tuple[str, ...] = ()


CHAT = Interface("messages", ("max_completion_tokens", "max_tokens"), more=("stop",))
RESPONSES = Interface("input", ("max_output_tokens",), more=("instructions",))


def checked_fields(body: dict[str, Any], interface: Interface, limits: Limits) -> dict[str, Any]:
    """The fields that are handed on; those without effect here are left out.

    Raises:
        FoveateError: a field that is unknown, that would change the answer and cannot be served, or of a wrong value.
    """
    known = {*_PASSED, *interface.more, *interface.longest, interface.content, SPEC}
    for name, value in body.items():
        if name in _ONLY:
            if value is not None and value not in _ONLY[name]:
                raise FoveateError(f"{name}={short(repr(value))} is not served here; leave it out")
        elif name not in known and name not in _WITHOUT_EFFECT:
            raise FoveateError(f"there is no field {short(repr(name))} here; {did_you_mean(name, sorted(known))}")
    taken = {name: value for name, value in body.items() if name in known and value is not None}
    _check_numbers(taken)
    if "temperature" in taken and taken["temperature"] < COLDEST:
        taken["temperature"] = 0
    _check_longest(taken, interface, limits)
    if interface.content not in taken:
        raise FoveateError(f"a request needs {interface.content!r}: what is asked")
    return taken


def _check_numbers(taken: dict[str, Any]) -> None:
    for name, least, most in (("temperature", 0.0, 2.0), ("top_p", 0.0, 1.0)):
        value = taken.get(name)
        if value is not None and not (_is_number(value) and least <= value <= most):
            raise FoveateError(f"{name}={short(repr(value))} is no number from {least:g} to {most:g}")
    seed = taken.get("seed")
    if seed is not None and not (isinstance(seed, int) and not isinstance(seed, bool) and abs(seed) < 2**63):
        raise FoveateError(f"seed={short(repr(seed))} is no whole number of at most 63 bits")
    if not isinstance(taken.get("stream", False), bool):
        raise FoveateError(f"stream={short(repr(taken['stream']))} is neither true nor false")
    stop = taken.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    if not (isinstance(texts, list) and len(texts) <= STOPS and all(isinstance(one, str) and one for one in texts)):
        raise FoveateError(f"stop is no text and no list of at most {STOPS} texts")
    model = taken.get("model", "")
    if not isinstance(model, str):
        raise FoveateError(f"model={short(repr(model))} is no text")


def _check_longest(taken: dict[str, Any], interface: Interface, limits: Limits) -> None:
    for name in interface.longest:
        value = taken.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FoveateError(f"{name}={short(repr(value))} is no number of tokens; the smallest is 1")
        if value > limits.max_new_tokens:
            raise FoveateError(f"{name}={value} is more than this server answers; the most is {limits.max_new_tokens}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def with_pictures(
    content: Any, where: str, limits: Limits, read: Callable[[str, str], Any], check: Callable[[str, str], None]
) -> Any:
    """Messages, or a text, whose addresses of pictures are the pictures themselves.

    Args:
        content: of the request's `messages` or `input`.
        where: that field's name, for messages.
        read: takes a URL and what it is called; returns its picture.
        check: takes a text and what it is called; refuses it.

    Raises:
        FoveateError: no such form, too many pictures, or what `read` and `check` refuse.
    """
    if isinstance(content, str):
        check(content, where)
        return content
    if not isinstance(content, list) or not content:
        raise FoveateError(f"{where} is no list of messages; the smallest has one")
    count = sum(1 for _ in _pictures(content))
    if count > limits.max_images:
        raise FoveateError(f"{count} pictures in a request; the most is {limits.max_images}")
    return [_message(one, f"{where}[{number}]", read, check) for number, one in enumerate(content)]


def _pictures(value: Any) -> Iterator[Any]:
    for one in value if isinstance(value, list) else ():
        if isinstance(one, dict):
            if one.get("type") in PICTURES:
                yield one
            yield from _pictures(one.get("content"))


def _message(one: Any, where: str, read: Any, check: Any) -> dict[str, Any]:
    if not isinstance(one, dict):
        raise FoveateError(f"{where} is no object")
    if "role" not in one and where.startswith(f"{RESPONSES.content}["):  # a part of the one message that `input` is
        return _part(one, where, read, check)
    role = one.get("role")
    if role not in ROLES:
        raise FoveateError(f"{where}: role={short(repr(role))} is not served; choices: {', '.join(ROLES)}")
    content = one.get("content")
    if isinstance(content, str):
        check(content, f"{where}.content")
    elif isinstance(content, list):
        parts = [_part(part, f"{where}.content[{number}]", read, check) for number, part in enumerate(content)]
        content = parts
    else:
        raise FoveateError(f"{where}.content is neither a text nor a list of parts")
    return {"role": role, "content": content}


def _part(part: Any, where: str, read: Any, check: Any) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise FoveateError(f"{where} is no object")
    kind = part.get("type")
    if kind in TEXTS:
        if not isinstance(part.get("text"), str):
            raise FoveateError(f"{where}.text is no text")
        check(part["text"], f"{where}.text")
        return part
    if kind in PICTURES:
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise FoveateError(f"{where}.image_url holds no url; give a data URL: data:image/png;base64,...")
        return {**part, "image_url": {"url": read(url, where)}}
    raise FoveateError(f"{where}: type={short(repr(kind))} is not served; choices: text, image_url")
