"""`foveate methods` and `foveate models` say what the registry and the families hold."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from foveate import methods, spec
from foveate.evaluate import catalogue
from foveate.families.rows import FAMILIES


@pytest.fixture
def terminal(call: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the command on a terminal of so many columns; its lines, without colours."""

    def lines(columns: int, *arguments: object) -> list[str]:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        result = call(*arguments)
        assert (result.code, result.err) == (0, "")
        return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in result.out.splitlines()]

    return lines


def test_methods_as_a_table(call: Any) -> None:
    result = call("methods")
    assert (result.code, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert header.split()[0] == "name"
    assert [line.split()[0] for line in lines] == list(methods.names())
    fopru = next(line for line in lines if line.startswith("fopru"))
    assert fopru.split(maxsplit=2)[1:] == ["input", methods.summary(methods.get("fopru"))]


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_lists_fit_the_terminal(columns: int, terminal: Any) -> None:
    found = terminal(columns, "methods")
    assert max(map(len, found)) <= columns
    assert {line.split()[0] for line in found if re.match(r" \w", line)} == {"name", *methods.names()}, (
        "names are whole"
    )
    found = terminal(columns, "models")
    assert max(map(len, found)) <= columns
    words = " ".join(found).replace(",", " ").split()
    assert {name for family in FAMILIES for name in (family.name, *family.hub_ids)} <= set(words)


@pytest.mark.parametrize("name", methods.names())
def test_one_method_fits_and_says_everything(name: str, call: Any, terminal: Any) -> None:
    found = terminal(80, "methods", name)
    assert max(map(len, found)) <= 80
    row = catalogue.describe(name)
    said = " ".join(" ".join(found).split())
    for part in (name, row["keeps"], row["acts"], row["class"], row["paper"] or name, *row["needs"], *row["required"]):
        assert part in said
    body, arguments = catalogue.about(name)
    for part in (*body.split(), *arguments.values()):
        assert part in said
    for field in row["defaults"]:
        assert any(line.startswith(f"{field}=") for line in found)
    assert json.loads(call("methods", name, "--json").out) == json.loads(json.dumps(row))


def test_one_method_as_it_is_read(terminal: Any) -> None:
    assert terminal(80, "methods", "random") == [
        "random  keeps tokens drawn uniformly, the floor that any scoring must beat.",
        "        The draw depends on (seed, tokens) alone, so that an image in a batch",
        "        keeps what it keeps alone.",
        "acts    before the decoder",
        "reads   nothing",
        "class   Random",
        "",
        "keep=0.25  tokens per image, or a share of them, rounded half to even.",
        "seed=0     of the draw, 0 or more.",
    ]


def test_names_that_are_none(call: Any) -> None:
    for kind, name, message in (
        ("methods", "forpu", "unknown method 'forpu'; did you mean 'fopru'? Choices: "),
        ("models", "gemma9", "unknown family 'gemma9'; did you mean 'gemma"),
    ):
        result = call(kind, name)
        assert (result.code, result.out) == (2, "") and message in result.err


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
    header, *lines = call("models").out.splitlines()
    assert header.split()[0] == "family"
    assert [line.split()[0] for line in lines] == [family.name for family in FAMILIES]
    assert "llava-hf/llava-1.5-7b-hf" in lines[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_one_family_by_its_name_or_type(family: Any, call: Any, terminal: Any) -> None:
    found = terminal(80, "models", family.name)
    assert max(map(len, found)) <= 80
    said = " ".join(" ".join(found).split())
    for part in (family.name, *family.types, *family.hub_ids, family.image, f">= {family.transformers}"):
        assert part in said
    for name in (family.name, *family.types):
        assert json.loads(call("models", name, "--json").out)["name"] == family.name
