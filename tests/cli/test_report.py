"""`foveate report`: one file from what `foveate eval` wrote, or a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_what_was_measured_is_shown(call: Any, folder: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "rows.json", tmp_path / "page.html"
    options = ("--model", folder, "--tasks", "scenes", "--device", "cpu", "--samples", 3, "--json", file)
    assert call("eval", *options, "--prune", "fopru:keep=4", "--pictures", 2, "--timed", 1).code == 0
    rows = json.loads(file.read_text())["rows"]
    assert all(0 < row["first_token_ms"] <= row["whole_ms"] and len(row["layers"]) == 4 for row in rows)
    result = call("report", file, "--out", page)
    assert (result.code, result.out.strip(), result.err) == (0, str(page), "")
    text = page.read_text()
    for name in ("tokens", "first-token", "answer", "layers", "pictures", "table", "command"):
        assert f'<section id="{name}">' in text
    assert "picture-2" in text and "picture-3" not in text and 'class="heat"' in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.json", "--out", "page.html"], "gone.json cannot be read"),
        (["{folder}", "--out", "page.html"], "holds no rows.json"),
        (["gone.json", "--out", "page.pdf"], "page.pdf ends in '.pdf'; the choices are .html, .htm"),
        (["gone.json", "--out", "no/page.html"], "there is no folder no"),
    ],
)
def test_what_cannot_be_shown_is_refused(call: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call("report", *[word.format(folder=tmp_path) for word in arguments])
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timed", "-1"], "--timed -1 is no number of questions; the smallest is 0"),
        (["--pictures", "2"], "--pictures 2 are put into the file of --json; name one"),
    ],
)
def test_wrong_numbers_are_refused(call: Any, options: list[str], message: str) -> None:
    result = call("eval", "--model", "no", "--tasks", "scenes", *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
