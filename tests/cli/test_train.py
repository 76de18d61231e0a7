"""`foveate train mini` hands its options to the recipe and prints where the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import foveate


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
