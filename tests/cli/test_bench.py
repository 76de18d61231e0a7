"""`foveate bench`: its tables, its file and plot, and settings that are refused before a model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FEW = ("--layers", 2, "--text", 8, "--answer", 2, "--repeats", 2, "--warmup", 0, "--device", "cpu")


@pytest.fixture
def bench(call: Any) -> Any:
    return lambda *options: call("bench", "--random-weights", "mini", *FEW, *options)


def test_rivals_beside_the_unpruned_model(bench: Any, tmp_path: Path) -> None:
    file, plot = tmp_path / "results.json", tmp_path / "results.png"
    options = ("--batch", 2, "--json", file, "--plot", plot)
    result = bench("--prune", "fopru:keep=0.25", "--prune", "cdpruner:keep=64", *options)
    assert (result.code, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert header.split()[:3] == ["method", "tokens", "first"]
    assert [line.split()[:2] for line in lines[:3]] == [
        ["none", "576"],
        ["fopru:keep=0.25", "144"],
        ["cdpruner:keep=64", "64"],
    ]
    assert "medians of 2 rounds, quartiles in brackets" in result.out
    assert "predicted for cpu: the roofline's bound" in result.out
    assert "nearest to these first tokens" in result.out
    stored = json.loads(file.read_text())
    assert {key: stored[key] for key in ("batch", "answer", "model", "layers", "dtype")} == {
        "batch": 2, "answer": 2, "model": "mini", "layers": 2, "dtype": "float32"
    }  # fmt: skip
    assert [row["prune"] for row in stored["results"]] == [None, "fopru:keep=0.25", "cdpruner:keep=64"]
    first = stored["results"][1]["first_token_ms"]
    assert first["low"] <= first["median"] <= first["high"]
    with Image.open(plot) as drawn:
        assert drawn.size[0] > 500


def test_the_papers_table(bench: Any) -> None:
    lines = bench("--paper-table", "--hardware", "none").out.splitlines()
    assert lines[0].split() == ["Ratio", "Method", "TTFT", "(ms)", "Sp", "TPOT", "(ms/tok.)", "Sp", "GPU", "(GB)"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["100%", "-"],
        ["75%", "fopru"],
        ["50%", "fopru"],
        ["25%", "fopru"],
    ]
    assert lines[1].split()[3] == "-" and lines[2].split()[3].endswith("x")
    assert not any("predicted" in line for line in lines)


def test_a_checkpoint(call: Any, folder: Path) -> None:
    result = call("bench", folder, "--prune", "fopru:keep=0.25", "--answer", 2, "--repeats", 1, "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    assert [line.split()[:2] for line in result.out.splitlines()[1:3]] == [["none", "36"], ["fopru:keep=0.25", "9"]]


def test_a_tuned_checkpoint_is_timed_under_its_spec(call: Any, folder: Path, adapter: Path, tmp_path: Path) -> None:
    given = ("bench", folder, "--adapter", adapter, "--answer", 2, "--repeats", 1, "--device", "cpu")
    result = call(*given, "--prune", "fopru:keep=9", "--json", tmp_path / "times.json")
    assert (result.code, result.err) == (0, "")
    assert json.loads((tmp_path / "times.json").read_text())["adapter"] == str(adapter)
    refused = call(*given, "--prune", "fopru:keep=4")
    assert refused.code == 2 and "was tuned under fopru:keep=9, not fopru:keep=4" in refused.err
    refused = call("bench", "--random-weights", "mini", "--adapter", adapter)
    assert refused.code == 2 and "--adapter belongs to a MODEL; random weights have none" in refused.err


def test_choosing_that_does_not_pay_is_said(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.evaluate.bench.warnings", lambda results: ["fopru costs more than it saves: ..."])
    assert "warning: fopru costs more than it saves" in bench("--prune", "fopru").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a MODEL or --random-weights PRESET, one of them"),
        (["mini", "--random-weights", "mini"], "one of them"),
        (["mini", "--layers", "2"], "--layers cuts a PRESET short"),
        (["--random-weights", "mini", "--layers", "1"], "layers=1 leaves no block to prune between"),
        (["--random-weights", "internvl3-9b"], "is no preset and no folder; did you mean 'internvl3-8b'?"),
        (["--random-weights", "mini", "--repeats", "0"], "repeats=0 is below 1"),
        (["--random-weights", "mini", "--batch", "0"], "--batch 0 is below 1"),
        (["--random-weights", "mini", "--hardware", "b900"], "no hardware is called 'b900'"),
        (["--random-weights", "mini", "--device", "toaster"], "unknown device 'toaster'"),
        (["--random-weights", "mini", "--prune", "fopro"], "did you mean 'fopru'?"),
        (["--random-weights", "mini", "--paper-table", "--prune", "h2o"], "H2O keeps no single share"),
        (["--random-weights", "mini", "--compile", "--prune", "h2o"], "compiled decoding needs a static cache"),
        (["--random-weights", "mini", "--compile", "--warmup", "0"], "the smallest with it is warmup=1"),
        (["--random-weights", "mini", "--json", "a.csv"], "a.csv ends in '.csv'"),
        (["--random-weights", "mini", "--plot", "a.jpg"], "a.jpg ends in '.jpg'"),
    ],
)
def test_refused(call: Any, arguments: list[str], message: str) -> None:
    result = call("bench", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
