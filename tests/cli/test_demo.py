"""`foveate demo`: a picture of three panels and a table whose figures come from the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from PIL import Image

from foveate.cli import demo
from foveate.cli.output import note_precision
from foveate.inference.pictures import load_image
from foveate.scenes import generator


def test_a_file_in_the_way_is_refused(call: Any, tmp_path: Path) -> None:
    (tmp_path / "demo").touch()
    result = call("demo", "--out", tmp_path / "demo")
    assert (result.code, result.err) == (2, f"foveate: {tmp_path / 'demo'} is a file; give a folder\n")


def test_the_questions_are_of_four_kinds_and_about_the_dog() -> None:
    asked = demo._questions(generator.demo())
    assert [question.kind for question in asked] == ["color", "digit", "count", "describe"]
    assert asked[0].text == "what color is behind the dog ?"


@pytest.mark.slow
def test_the_demo(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TURNS", 1)
    monkeypatch.setattr(demo, "STEPS", 3)
    monkeypatch.setattr("foveate.ops.precision.cpu_multiplies_bfloat16", lambda: True)  # else stderr has a note
    out = tmp_path / "new" / "demo"
    result = call("demo", "--out", out, "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    lines = [line.strip() for line in result.out.splitlines()]
    assert next(line for line in lines if line.startswith("visual tokens")).count("576 -> 144") == 2
    for name in ("prefill FLOPs", "KV cache", "first token", "per token"):
        row = next(line for line in lines if line.startswith(name))
        assert len(row.removeprefix(name).split()) == 6  # three figures, each with its unit
    assert "what color is behind the" in result.out
    assert sorted(path.name for path in out.iterdir()) == ["kept.png", "scene.png"]
    scene, kept = load_image(out / "scene.png"), load_image(out / "kept.png")
    assert scene.tobytes() == generator.demo().image(0).tobytes()
    assert kept.width > 3 * scene.width * demo.SCALE
    panel = kept.crop((0, 0, 672, 672))
    assert panel.tobytes() == scene.resize((672, 672), Image.Resampling.LANCZOS).tobytes()


@pytest.mark.parametrize(
    ("dtype", "has", "noted"), [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)]
)
def test_a_cpu_without_bfloat16_is_told_of(
    dtype: str, has: bool, noted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("foveate.ops.precision.cpu_multiplies_bfloat16", lambda: has)
    note_precision(tiny.model().to(getattr(torch, dtype)))
    said = capsys.readouterr()
    words = "Note: this CPU has no instructions for bfloat16: prompts are several times faster with --dtype float32.\n"
    assert (said.out, said.err) == ("", words if noted else "")
