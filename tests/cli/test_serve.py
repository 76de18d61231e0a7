"""`foveate serve`: what is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

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
        (["--engine", "vllm", "--adapter", "a"], "--adapter and --any-spec belong to serving without an engine"),
        (["--any-spec"], "is about an adapter, and none was given (--adapter)"),
    ],
)
def test_a_mistake_is_told_at_once(call: Call, options: list[str], message: str) -> None:
    done = call("serve", "mini", *options)
    assert done.code == 2 and message in done.err


def test_a_tuned_model_is_served_under_its_spec(
    call: Call, folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[str, str]] = []
    monkeypatch.setattr("foveate.serve.local.server.serve", lambda *given: None)
    monkeypatch.setattr(
        "foveate.serve.local.server.application",
        lambda loaded, spec, **given: served.append((loaded.name, spec)),
    )
    given = ("serve", folder, "--device", "cpu", "--no-page", "--adapter", adapter, "--prune")
    refused = call(*given, "fopru:keep=4")
    assert refused.code == 2 and "was tuned under fopru:keep=9, not fopru:keep=4" in refused.err
    assert [call(*given, spec).code for spec in ("fopru:keep=9", "none")] == [0, 0]
    assert call(*given, "fopru:keep=4", "--any-spec").code == 0
    assert served == [(f"{folder} with {adapter}", spec) for spec in ("fopru:keep=9", "none", "fopru:keep=4")]
