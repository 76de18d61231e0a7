"""`foveate serve`: what is refused before a model is loaded."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from cli.conftest import Call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "sglang"], "unknown engine 'sglang'; choices: vllm"),
        (["--prune", "fopru", "--prune", "divprune"], "takes one --prune, not 2"),
        (["--prune", "fopro:keep=3"], "did you mean 'fopru'"),
        (["--max-model-len", "9"], "--max-model-len is no option of serve"),
        (["--route", "in-tree"], "--route belongs to --engine vllm"),
        (["--foveate-methods", "fopru"], "--foveate-methods belongs to --engine vllm"),
        (["--port", "70000"], "--port 70000 is no port"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 leaves nothing to serve"),
        (["--engine", "vllm", "--queue", "3"], "belong to serving without an engine"),
    ],
)
def test_a_mistake_is_told_at_once(call: Call, options: list[str], message: str) -> None:
    done = call("serve", "mini", *options)
    assert done.code == 2 and message in done.err
