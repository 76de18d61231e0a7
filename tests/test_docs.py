"""The pages and tables that are made from the methods say what the methods say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from outside import loaded

from foveate import methods
from foveate.core import FoveateError, Signals, described
from foveate.evaluate.catalogue import about, at, describe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return loaded("tools/render_docs.py")


def test_nothing_is_out_of_date(tool: ModuleType) -> None:
    """`python tools/render_docs.py` makes them anew."""
    texts = tool.texts()
    assert [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text] == []
    assert {path.stem for path in tool.PAGES.glob("*.md")} == set(methods.names())


@pytest.mark.parametrize("name", methods.names())
def test_a_page_says_what_the_method_is(name: str, tool: ModuleType) -> None:
    text = tool.page(name)
    row = describe(name)
    assert str(row["paper"]) in text or row["paper"] is None
    assert row["acts"] in text
    for field in row["defaults"]:
        assert f"| `{field}` |" in text, f"the docstring of {name} does not say what {field} is"
    for need in row["needs"]:
        assert f"`{need}`" in text or described(Signals)[need].words == ""


@pytest.mark.parametrize("name", methods.names())
def test_every_method_that_can_be_drawn_is(name: str, tool: ModuleType) -> None:
    assert (tool.PAGES / f"{name}.png").exists() == bool(tool.shown(name))


def test_a_docstring_is_read_as_text_and_arguments() -> None:
    body, arguments = about("fastv")
    assert body.startswith("The first `layer` blocks run in full")
    assert arguments["layer"] == "decoder blocks that run at full length, their K."
    assert arguments["keep"].startswith("tokens per image, or a share of them") and "\n" not in arguments["keep"]


@pytest.mark.parametrize(
    ("name", "keep", "spec"),
    [
        ("fopru", 64, "fopru:keep=64"),
        ("pyramiddrop", 32, "pyramiddrop:keep=32/32/32"),
        ("random", 16, "random:keep=16"),
    ],
)
def test_a_budget_is_given_to_every_stage(name: str, keep: int, spec: str) -> None:
    assert str(at(name, keep, 576)) == spec


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [("h2o", 64, "h2o drops cache entries, not visual tokens"), ("fopru", 600, "the image has 576 tokens")],
)
def test_a_budget_that_makes_no_sense_is_refused(name: str, keep: int, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        at(name, keep, 576)


def test_accuracies_stand_in_their_columns(tool: ModuleType) -> None:
    rows: list[dict[str, Any]] = [
        {"method": "none", "accuracy": 0.9, "tokens": 576, "equivalent_tokens": 576, "samples": 500},
        {"method": "ceiling (x)", "accuracy": 0.7, "tokens": 76.4, "equivalent_tokens": 76.4},
    ]
    unreached = []
    for row in tool.ordered():
        try:
            method = str(tool.budgeted(row["name"], 64))
        except FoveateError as error:
            unreached.append({"method": row["name"], "keep": [64], "why": str(error)})
            continue
        staged = row["site"] == "layer"
        rows.append({"method": method, "accuracy": 0.5, "tokens": 64, "equivalent_tokens": 200 if staged else 64})
    found = {"every": [64], "samples": 500, "command": "foveate eval", "rows": rows, "unreached": unreached}
    lines = tool.accuracy(json.loads(json.dumps(found))).splitlines()
    assert "| all 576 tokens | 90.0 |" in lines
    assert "| those of the object asked about, about 76 tokens | 70.0 |" in lines
    assert "| [`fopru`](methods/fopru.md) | 50.0 |" in lines
    assert "| [`fastv`](methods/fastv.md) | 50.0 (200) |" in lines
    assert not any("h2o" in line for line in lines)
    assert any("4.4 points" in line for line in lines)  # 1.96 * sqrt(0.25 / 500)
