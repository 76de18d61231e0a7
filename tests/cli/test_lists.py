"""`foveate methods` and `foveate models` say what the registry and the families hold."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from foveate import methods, spec
from foveate.evaluate import catalogue
from foveate.families import FAMILIES


def test_methods_as_a_table(call: Any) -> None:
    result = call("methods")
    assert (result.code, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert header.split()[0] == "name"
    assert [line.split()[0] for line in lines] == list(methods.names())
    fopru = next(line for line in lines if line.startswith("fopru"))
    for part in (
        methods.summary(methods.get("fopru")),
        " input ",
        "keep=0.25, strategy=rank",
        "arxiv.org/abs/2411.14164",
    ):
        assert part in fopru


def test_methods_as_json(call: Any) -> None:
    rows = json.loads(call("methods", "--json").out)
    assert [row["name"] for row in rows] == list(methods.names())
    for row in rows:
        kind = methods.get(row["name"])
        assert row == json.loads(json.dumps(catalogue.describe(row["name"])))
        assert row["keeps"]
        if not row["required"] and not row["trained"]:
            parsed = spec.parse(row["name"])
            defaults = {name: getattr(parsed, name) for name in row["defaults"]}
            assert row["defaults"] == json.loads(json.dumps(defaults))  # tuples are lists there
            assert row["defaults"].keys() == {field.name for field in dataclasses.fields(kind) if field.init}


def test_models(call: Any) -> None:
    rows = json.loads(call("models", "--json").out)
    assert [row["name"] for row in rows] == [family.name for family in FAMILIES]
    assert rows[0]["models"][0] == "mini"
    table = call("models").out
    assert "llava-hf/llava-1.5-7b-hf" in table
    assert f">= {FAMILIES[0].transformers}" in table
