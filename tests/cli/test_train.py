"""`foveate train mini` hands its options to the recipe and prints where the model is."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.cli.errors import as_options


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the recipe was called with; nothing is trained."""
    seen: dict[str, Any] = {}

    def train_mini(out: Path, **options: Any) -> Path:
        options.pop("progress")({"step": 20, "loss": 0.123456})
        seen.update(out=out, **options)
        return out / "mini"

    monkeypatch.setattr("foveate.scenes.recipe.train_mini", train_mini)
    return seen


def test_options_reach_the_recipe(call: Any, given: dict[str, Any], tmp_path: Path) -> None:
    options = "--max-seconds 5 --device cpu --resume --start mini --batch 4 --seed 7".split()
    result = call("train", "mini", "--out", tmp_path, *options)
    assert (result.code, result.out) == (0, f"{tmp_path / 'mini'}\n")
    assert result.err == "step 20  loss 0.1235\n"
    assert given == {
        "out": tmp_path,
        "max_seconds": 5.0,
        "device": torch.device("cpu"),
        "resume": True,
        "start": foveate.MINI,
        "batch": 4,
        "seed": 7,
    }


def test_defaults_start_from_nothing(call: Any, given: dict[str, Any], tmp_path: Path) -> None:
    assert call("train", "mini", "--out", tmp_path, "--device", "cpu").code == 0
    assert (given["start"], given["batch"], given["resume"], given["seed"]) == (None, None, False, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-seconds", "0"], "--max-seconds 0 leaves no time; it must be above 0"),
        (["--batch", "0"], "--batch 0 is below 1 picture; the smallest is 1"),
        (["--start", "./none"], "there is no folder ./none"),
        (["--device", "cuda:99"], "torch sees"),
    ],
)
def test_wrong_options_are_refused(
    call: Any, given: dict[str, Any], tmp_path: Path, options: list[str], message: str
) -> None:
    result = call("train", "mini", "--out", tmp_path, *options)
    assert result.code == 2
    assert message in result.err
    assert given == {}


def test_errors_of_the_recipe_speak_of_options(call: Any, tmp_path: Path) -> None:
    def refused(*options: Any) -> str:
        result = call("train", "mini", "--out", tmp_path / "run", "--device", "cpu", *options)
        assert result.code == 1
        return result.err.removeprefix("foveate: ").removesuffix("\n")

    again = "resume with the same settings, model and data, or start in another folder"
    run = tmp_path / "run"
    assert refused("--resume") == f"{run} holds no run to go on with; start one there with no --resume"
    assert call("train", "mini", "--out", run, "--device", "cpu", "--max-seconds", "1e-9").code == 0
    assert refused() == f"{run} already holds a run; go on with it by --resume, or give another folder"
    assert refused("--resume", "--seed", "7") == f"{run} was begun with --seed 0, not --seed 7; {again}"
    assert refused("--resume", "--batch", "3") == f"{run} was begun with --batch 16, not --batch 3; {again}"


def test_parameters_become_options() -> None:
    def command(bf16: bool = True, resume: bool = False, ratios: str = "", ratio_loss: str = "") -> None:
        pass

    parameters = inspect.signature(command).parameters
    for said, meant in {
        "go on by resume=True.": "go on by --resume.",
        "resume=False or bf16=False; bf16=True": "no --resume or --no-bf16; --bf16",
        "ratios=(0.5, 0.3), not ratios=[0.1]": "--ratios 0.5/0.3, not --ratios 0.1",
        "ratio_loss='mse' is": "--ratio-loss 'mse' is",
        "max_ratios=3 and attn_implementation='eager'": "max_ratios=3 and attn_implementation='eager'",
        "the end is ratios=0.5.": "the end is --ratios 0.5.",
    }.items():
        assert as_options(said, parameters) == meant
