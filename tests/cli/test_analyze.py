"""`foveate analyze`: three figures, their numbers as JSON and as a table, and what is refused before work starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from models import tiny
from PIL import Image

from foveate.report import figures

FILES = ["analysis.json", "attention.png", "similarity.png", "tokens.png"]


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn small: most of their time goes into pixels."""
    monkeypatch.setattr(figures, "_DPI", 40)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_figures_json_and_table(call: Any, folder: Path, picture: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / "new" / "out", tmp_path / "copy.json"
    options = ("--question", "w7 w8 w9", "--alpha", "0.5", "--where", 2, "--device", "cpu", "--dtype", "float32")
    result = call("analyze", folder, picture, picture, "--out", out, "--json", copy, *options)
    assert (result.code, result.err) == (0, "")
    assert names(out) == FILES
    for name in FILES[1:]:
        with Image.open(out / name) as figure:
            assert figure.format == "PNG" and figure.width > 200
    report = json.loads((out / "analysis.json").read_text())
    assert json.loads(copy.read_text()) == report
    assert report["model"] == str(folder)
    assert report["method"] == "image_text_interaction:alpha=0.5,where=2"
    assert [one["name"] for one in report["inputs"]] == ["picture.png"] * 2
    assert report["inputs"][0]["tokens"] == {"before": 1, "visual": tiny.TOKENS, "after": 4, "special": 0}
    split = report["inputs"][0]["similarity"]["split"]
    assert report["inputs"][0]["similarity"]["count"] == max(1, round(0.5 * split))
    lines = result.out.splitlines()
    assert lines[0].split()[0] == "block"
    for block, line in zip(report["attention"], lines[1:5], strict=True):
        assert line.startswith(f"{block['block']}")
        assert line.split()[-4:] == [
            f"{block[key]:.1%}" for key in ("top_quarter", "tokens_holding_80", "least", "most")
        ]
    assert lines[3].startswith("2 (read)")
    assert f"{tiny.TOKENS} of {tiny.TOKENS + 5} ({tiny.TOKENS / (tiny.TOKENS + 5):.1%})" in result.out
    assert all(str(out / name) in lines[-1] for name in FILES)


def test_without_pictures_scenes_are_measured(
    call: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("analyze", folder, "--device", "cpu").code == 0
    report = json.loads((tmp_path / "runs" / "analyze" / "analysis.json").read_text())
    assert [one["name"] for one in report["inputs"]] == [f"scene {number}" for number in range(1, 9)]
    asked = {one["question"] for one in report["inputs"]}
    assert len(asked) > 4 and "describe" in asked


def test_an_encoder_without_cls_has_no_similarity(call: Any, picture: Path, tmp_path: Path) -> None:
    tiny.save(tiny.model(tower="siglip"), tmp_path / "model")
    result = call("analyze", tmp_path / "model", picture, "--out", tmp_path / "out", "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    assert names(tmp_path / "out") == ["analysis.json", "attention.png", "tokens.png"]
    assert "the encoder siglip_vision_model has no CLS token, so there is no similarity.png" in result.out
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["similarity"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--question", " "], "--question is empty; ask at least one word"),
        (["--out", "pyproject.txt"], "pyproject.txt is a file; give a folder"),
        (["--json", "numbers.txt"], "numbers.txt ends in '.txt'; the choices are .json"),
        (["--json", "no/numbers.json"], "there is no folder no"),
        (["--alpha", "0"], "alpha=0.0 is no positive number"),
        (["--where", "0"], "where=0 is neither a number of encoder blocks from 1"),
        (["gone.png"], "gone.png is no file; give the path of a picture"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_wrong_arguments_are_refused_before_work(
    call: Any, folder: Path, picture: Path, tmp_path: Path, monkeypatch: Any, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.txt").touch()
    result = call("analyze", folder, picture, *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_block_that_is_not_there_is_a_failure(call: Any, folder: Path, picture: Path, tmp_path: Path) -> None:
    result = call("analyze", folder, picture, "--where", 9, "--out", tmp_path / "out", "--device", "cpu")
    assert (result.code, result.out, result.err) == (1, "", "foveate: encoder block 8 is outside 0..3\n")
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_is_told_first(
    call: Any, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = call("analyze", "mini", picture, "--out", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert "install it with: pip install 'foveate[draw]'" in result.err


def test_it_explains_itself(call: Any) -> None:
    assert "\n  analyze " in call("--help").out
    result = call("analyze", "-h")
    assert result.code == 0
    assert "Usage: foveate analyze" in result.out
