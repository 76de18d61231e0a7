"""Rows put into a file of results: beside those of the same model and questions only, and never half of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.core import FoveateError
from foveate.evaluate import results, scenes_task

ASKED = {"model": "mini", "task": "scenes", "samples": 5, "seed": 0, "data": "ab12"}


def row(method: str, accuracy: float = 0.5) -> dict[str, Any]:
    return {"method": method, "accuracy": accuracy, "tokens": 36.0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    unreached = [
        {"method": "tome", "keep": [16], "why": "too few"}, {"method": "trim", "keep": [16, 64], "why": "no CLIP"},
    ]  # fmt: skip
    rows = [row("none"), row("random:keep=16", 0.25)]
    more = {"every": [64, 16], "unreached": unreached, "notes": ["by hand"]}
    path.write_text(json.dumps({"command": "foveate eval --every 64/16", **ASKED, "rows": rows, **more}))
    return path


def appended(file: Path, *rows: dict[str, Any], **settings: Any) -> tuple[list[str], dict[str, Any]]:
    replaced = results.append(file, rows, **{"asked": ASKED, "command": "foveate eval --append", **settings})
    return replaced, json.loads(file.read_text())


def test_rows_are_added_and_all_else_stays(file: Path) -> None:
    before = json.loads(file.read_text())
    replaced, found = appended(file, row("none"), row("pool:keep=16"), row("uniform:keep=16"))
    assert replaced == []
    assert found["rows"] == [*before["rows"], row("pool:keep=16"), row("uniform:keep=16")]
    assert found["command"] == "foveate eval --every 64/16\nfoveate eval --append"
    assert {key: found[key] for key in ("notes", "every", "unreached")} == {
        key: before[key] for key in ("notes", "every", "unreached")
    }


def test_a_row_of_the_same_method_gives_way(file: Path) -> None:
    replaced, found = appended(file, row("none"), row("random:keep=16", 0.75))
    assert replaced == ["random:keep=16"]
    assert found["rows"] == [row("none"), row("random:keep=16", 0.75)]
    assert appended(file, row("none"), row("random:keep=16", 0.75))[0] == [], "the same figures replace nothing"


def test_what_cannot_be_reached_is_said_anew_for_the_budgets_that_were_asked_for(file: Path) -> None:
    now = [{"method": "trim", "keep": [16], "why": "no text tower"}]
    _, found = appended(file, row("none"), row("tome:keep=16"), budgets=[16], unreached=now)
    assert found["unreached"] == [{"method": "trim", "keep": [64], "why": "no CLIP"}, *now]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "was measured with model='mini', not 'other'"),
        ({"task": "pope"}, "task='scenes', not 'pope'"),
        ({"seed": 1, "samples": 6}, "samples=5, not 6, seed=0, not 1"),
        ({"data": "cd34"}, "data='ab12', not 'cd34'; its questions were drawn by another version"),
    ],
)
def test_rows_of_something_else_are_refused_by_name(file: Path, change: dict[str, Any], message: str) -> None:
    before = file.read_bytes()
    with pytest.raises(FoveateError, match=message):
        appended(file, row("none"), row("pool:keep=16"), asked={**ASKED, **change})
    assert file.read_bytes() == before


def test_an_unpruned_model_that_answers_otherwise_is_refused(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(FoveateError, match=r"is not the one of .*: accuracy 0\.5 there and 0\.75 now; use its weights"):
        appended(file, row("none", 0.75), row("pool:keep=16"))
    assert file.read_bytes() == before


def test_an_older_file_learns_which_questions_it_is_about(file: Path) -> None:
    older = json.loads(file.read_text())
    del older["data"]
    file.write_text(json.dumps(older))
    assert appended(file, row("none"), row("pool:keep=16"))[1]["data"] == "ab12"


def test_what_others_put_there_meanwhile_stays(file: Path) -> None:
    results.read(file)  # as a run does before its work
    appended(file, row("none"), row("pool:keep=16"))
    found = appended(file, row("none"), row("uniform:keep=16"))[1]
    assert list(results.rows_of(found)) == ["none", "random:keep=16", "pool:keep=16", "uniform:keep=16"]


def test_a_column_that_the_file_does_not_have_is_refused(file: Path) -> None:
    found = results.read(file)
    results.check_budgets(file, found, [16, 64])
    with pytest.raises(FoveateError, match="holds no column of 32 tokens; its budgets are 64/16"):
        results.check_budgets(file, found, [16, 32])
    with pytest.raises(FoveateError, match="its budgets are none: it was measured without --every"):
        results.check_budgets(file, {}, [16])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no file of foveate eval --json"),
        ('{"rows": []}', "is no file of foveate eval --json"),
        (json.dumps({"command": "", **ASKED, "rows": [{"accuracy": 1}]}), "is no file of foveate eval --json"),
        (json.dumps({"command": "", **ASKED, "rows": [row("pool")]}), "lacks the row of the unpruned model"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(FoveateError, match=message):
        results.read(path)


def test_the_digest_tells_questions_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first = scenes_task.digest(3, seed=0)
    assert first == scenes_task.digest(3, seed=0) != scenes_task.digest(3, seed=1)
    drawn = list(scenes_task.draw_samples(3, seed=0))
    assert first != scenes_task.digest(2, seed=0)
    drawn[1].image.putpixel((0, 0), (1, 2, 3))
    monkeypatch.setattr(scenes_task, "draw_samples", lambda count, **options: iter(drawn))
    assert scenes_task.digest(3, seed=0) != first
