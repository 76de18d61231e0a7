"""What `/openapi.json` says of requests: their fields, kinds and bounds, as `bodies.py` checks them."""

from __future__ import annotations

from typing import Any

from foveate.serve.local.bodies import CHAT, PICTURES, RESPONSES, ROLES, SPEC, STOPS, TEXTS, Interface
from foveate.serve.local.limits import Limits

DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR42mM4YaOBFTEMLQkAdntLAWbUZrk"
    "AAAAASUVORK5CYII="
)
"""A picture of 8 x 8 pixels, for examples."""
_TEXT: dict[str, Any] = {"type": "string"}
_END: dict[str, Any] = {**_TEXT, "minLength": 1}
_MORE: dict[str, Any] = {
    "instructions": _TEXT,
    "stop": {"anyOf": [_END, {"type": "array", "items": _END, "maxItems": STOPS}]},
}


def with_bodies(described: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """An OpenAPI document whose two questions have the bodies that this server takes.

    Args:
        described: as FastAPI makes it of routes that take any object.
    """
    for path, interface in (("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSES)):
        operation = described["paths"][path]["post"]
        content = {"schema": _body(interface, limits), "example": _example(interface)}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
        operation["responses"]["400"] = {"description": "What is wrong with the request, in OpenAI's form"}
    return described


def _body(interface: Interface, limits: Limits) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": {**_TEXT, "description": "the one that is served, or nothing"},
        "stream": {"type": "boolean"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "minimum": 0, "maximum": 1},
        "seed": {"type": "integer", "minimum": -(2**63) + 1, "maximum": 2**63 - 1},
        SPEC: {**_TEXT, "description": 'what pictures are pruned by, such as "fopru:keep=64"; "none" for nothing'},
        **{name: {"type": "integer", "minimum": 1, "maximum": limits.max_new_tokens} for name in interface.longest},
        **{name: _MORE[name] for name in interface.more},
        interface.content: _messages(),
    }
    if interface is RESPONSES:
        fields[interface.content] = {"anyOf": [_TEXT, _messages()]}
    return {
        "type": "object",
        "properties": fields,
        "required": [interface.content],
        "additionalProperties": False,
    }


def _messages() -> dict[str, Any]:
    url = {**_TEXT, "format": "uri", "description": "data:image/png;base64,..."}
    text = {"properties": {"type": {"enum": list(TEXTS)}, "text": _TEXT}, "required": ["type", "text"]}
    in_object = {"type": "object", "properties": {"url": url}, "required": ["url"]}
    picture = {
        "properties": {"type": {"enum": list(PICTURES)}, "image_url": {"anyOf": [in_object, url]}},
        "required": ["type", "image_url"],
    }
    parts = {"type": "array", "items": {"type": "object", "anyOf": [text, picture]}}
    message = {
        "type": "object",
        "properties": {"role": {"enum": list(ROLES)}, "content": {"anyOf": [_TEXT, parts]}},
        "required": ["role", "content"],
    }
    return {"type": "array", "items": message, "minItems": 1}


def _example(interface: Interface) -> dict[str, Any]:
    picture: dict[str, Any] = {"type": "image_url", "image_url": {"url": DOT}}
    text = {"type": "text", "text": "what is in this picture ?"}
    if interface is RESPONSES:
        picture, text = {"type": "input_image", "image_url": DOT}, {**text, "type": "input_text"}
    asked = [{"role": "user", "content": [picture, text]}]
    return {interface.content: asked, interface.longest[0]: 4, SPEC: "fopru:keep=64"}
