"""Answers with what pruning did: usage counts the prompt that the decoder saw, a field of our own tells the rest."""

from __future__ import annotations

import json
from typing import Any

from foveate.serve.local.bodies import SPEC
from foveate.serve.local.errors import error_body
from foveate.serve.local.jobs import Job

_PROMPT = ("prompt_tokens", "input_tokens")
_BY_HAND = '{"error": "'  # how an error begins that transformers writes, its message as it is between quotes


def with_report(answer: dict[str, Any], job: Job) -> dict[str, Any]:
    """An answer, or the event of a stream that brings the usage, with the report of its job."""
    usage = answer.get("usage") or {}
    for name in _PROMPT:
        if name in usage:
            usage["total_tokens"] += job.length - usage[name]
            usage[name] = job.length
    return {**answer, SPEC: job.report()}


def event_with_report(event: str, job: Job) -> str:
    """One server-sent event as it goes out: the last one of an answer with the report, an error in OpenAI's form.

    Args:
        event: without the blank line that ends it.
    """
    head, found, data = event.partition("data: ")
    if not found:
        return f"{event}\n\n"
    if data.startswith(_BY_HAND):
        message = data.removeprefix(_BY_HAND).removesuffix('"}')
        return f"data: {json.dumps(error_body(500, message))}\n\n"
    value = json.loads(data)
    if value.get("usage"):
        value = with_report(value, job)
    elif isinstance(value.get("response"), dict) and value["response"].get("usage"):
        value["response"] = with_report(value["response"], job)
    else:
        return f"{event}\n\n"
    return f"{head}data: {json.dumps(value)}\n\n"
