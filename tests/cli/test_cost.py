"""`foveate cost`: its tables, JSON, sweeps and plots, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.cost import estimate


def test_rivals_beside_the_unpruned_model(call: Any) -> None:
    result = call("cost", "llava-1.5-7b", "--prune", "fopru:keep=0.25", "--prune", "fastv")
    assert (result.code, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["none", "fopru:keep=0.25", "fastv:keep=0.5"]
    assert header.split("  ")[0] == "method"
    figures = lines[0].split()
    assert figures[1:6] == ["576", "8.453", "30.31", "22.21", "4.054"]
    assert lines[1].split()[2] == "2.665"
    assert "launches are left out" in result.out


def test_json_is_the_estimate(call: Any) -> None:
    options = ("--visual", 288, "--text", 30, "--batch", 2, "--answer", 5, "--hardware", "h200", "--dtype", "int8")
    result = call("cost", "llava-1.5-13b", *options, "--prune", "fopru:keep=0.25", "--json")
    stored = json.loads(result.out)
    setting: dict[str, Any] = dict(batch=2, answer=5, hardware="h200", dtype="int8")
    wanted = estimate("llava-1.5-13b", 288, 30, "fopru:keep=0.25", **setting).to_dict()
    assert stored["rows"][1] == {"prune": "fopru:keep=0.25", **json.loads(json.dumps(wanted))}
    assert stored["rows"][0]["prefill"]["flops"] == estimate("llava-1.5-13b", 288, 30, **setting).prefill.flops


def test_a_device_with_a_fit_prints_it(call: Any) -> None:
    result = call("cost", "llava-1.5-7b", "--hardware", "h200")
    assert "launched ms" in result.out
    assert "launched: 0.465 of the roofline's speed and 16.1 us a launch" in result.out


def test_stages(call: Any) -> None:
    lines = call("cost", "llava-1.5-7b", "--stages").out.splitlines()
    assert [line.split()[1] for line in lines[4:9]] == ["tower", "choosing", "projector", "prefill", "decode"]


def test_a_model_that_does_not_fit_is_said(call: Any) -> None:
    assert "do not fit in 24 GB unpruned" in call("cost", "llava-1.5-13b", "--hardware", "3090").out


def test_lvpruning_over_rho(call: Any, tmp_path: Path) -> None:
    options = ("--text", 30, "--convention", "weights", "--sweep", "keep", "--prune", "lvpruning")
    plot = tmp_path / "curve.png"
    result = call("cost", "llava-1.5-7b", *options, "--plot", plot)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[1].split()[:3] == ["none", "576", "8.381"]
    assert lines[3].split()[0] == "lvpruning:keep=0.5/0.3/0.1"
    assert lines[3].split()[2] == "3.189"
    with Image.open(plot) as drawn:
        assert drawn.size[0] > 500
    stored = json.loads(call("cost", "llava-1.5-7b", *options, "--json").out)["rows"]
    assert [row["keep"] for row in stored[1:]] == [round(0.45 + 0.05 * step, 2) for step in range(12)]


def test_a_plot_of_stages(call: Any, tmp_path: Path) -> None:
    plot = tmp_path / "stages.png"
    result = call("cost", "mini", "--prune", "fopru:keep=0.25", "--plot", plot)
    assert result.code == 0 and f"drawn: {plot}" in result.out
    with Image.open(plot) as drawn:
        assert drawn.size[0] > 500


def test_what_papers_print(call: Any) -> None:
    result = call("cost", "--published")
    row = next(
        line for line in result.out.splitlines() if "PruMerge+, 144 + 60 tokens, int4" in line and " ms " in line
    )
    assert row.split()[-3:] == ["2.5", "4.46", "no"]
    cells = json.loads(call("cost", "--published", "--json").out)
    assert cells[0]["published"] == 8.5 and cells[0]["agrees"] is True


def test_a_folder(call: Any, folder: Path) -> None:
    assert call("cost", folder, "--visual", 36).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which MODEL? Give a preset such as llava-1.5-7b"),
        (["llava-1.5-7c"], "'llava-1.5-7c' is no preset and no folder; did you mean 'llava-1.5-7b'?"),
        (["mini", "--visual", "0"], "visual=0 is below 1"),
        (["mini", "--hardware", "h300"], "no hardware is called 'h300'; did you mean"),
        (["mini", "--dtype", "fp6"], "unknown dtype 'fp6'"),
        (["mini", "--convention", "w"], "'w' is no way of counting operations"),
        (["mini", "--prune", "fopro"], "did you mean 'fopru'?"),
        (["mini", "--prune", "trim"], "decides its own count from the image"),
        (["mini", "--prune", "fopru", "--kept", "40%"], "--kept 40% is for a --prune that decides its own count"),
        (["mini", "--prune", "trim", "--kept", "some"], "--kept some is no number; write tokens such as 400"),
        (["mini", "--prune", "resize"], "mini brings all pictures to one size, so that nothing is saved"),
        (["mini", "--sweep", "keep"], "say with --prune which"),
        (["mini", "--sweep", "batch", "--prune", "fopru"], "--sweep batch cannot be swept; Choices: keep."),
        (["mini", "--sweep", "keep", "--prune", "h2o"], "H2O has no keep to sweep"),
        (["mini", "--plot", "a.pdf"], "a.pdf ends in '.pdf'; the choices are .png"),
    ],
)
def test_refused(call: Any, arguments: list[str], message: str) -> None:
    result = call("cost", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_what_a_method_that_decides_left_is_said_with_kept(call: Any) -> None:
    """The others count for themselves."""
    rivals = ("--prune", "pixelprune", "--prune", "fopru:keep=0.25")
    rows = json.loads(call("cost", "llava-1.5-7b", *rivals, "--kept", "40%", "--json").out)["rows"]
    assert [row["visual"][0] for row in rows] == [576, 230, 144]
    assert rows[1] == {"prune": "pixelprune", **json.loads(json.dumps(pruned_to(230)))}


def pruned_to(kept: int) -> Any:
    return estimate("llava-1.5-7b", methods="pixelprune", kept=kept).to_dict()
