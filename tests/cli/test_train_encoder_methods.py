"""`foveate train dynamicvit` and `crossget`: options reach the training, mini has its own, wrong ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the training was called with; nothing is trained."""
    seen: dict[str, Any] = {}

    def train(base: Any, rows: Any, out: Path, settings: Any, **options: Any) -> Path:
        options.pop("report")({"step": 10, "loss": 0.123456})
        seen.update(base=base, rows=rows, out=out, settings=settings, **options)
        return out / "modules"

    for name in ("dynamicvit", "crossget"):
        monkeypatch.setattr(f"foveate.train.{name}.train_{name}", train)
    return seen


@pytest.mark.parametrize(("name", "budgets"), [("dynamicvit", (32, 32, 32)), ("crossget", (32,))])
def test_the_shipped_model_has_its_own_settings(
    name: str, budgets: tuple[int, ...], call: Any, given: dict[str, Any], tmp_path: Path
) -> None:
    result = call("train", name, "--out", tmp_path, "--steps", 3, "--pool", 4, "--device", "cpu")
    assert (result.code, result.out) == (0, f"{tmp_path / 'modules'}\n"), result.err
    settings = given["settings"]
    assert budgets in settings.budgets and settings.rate > 1e-4 and settings.steps == 3
    assert f"learning rate {settings.rate:g}, batch {settings.batch}, budgets " in result.err
    assert "step 10  loss 0.1235\n" in result.err
    row = given["rows"][0]
    assert row.features is None and row.given["pixel_values"].shape == (1, 3, 336, 336)
    assert int((row.ids == given["base"].config.image_token_id).sum()) == 576
    assert (given["name"], given["resume"], given["max_seconds"]) == ("mini", False, None)


def test_options_reach_the_training(call: Any, given: dict[str, Any], tmp_path: Path) -> None:
    options = (
        "--layers 2/4 --ratios 0.4/0.2 --rate 1e-5 --batch 4 --micro 2 --epochs 3 --steps 7 --ratio-weight 5 "
        "--causal-weight 0.5 --likeness-weight 0.1 --token-weight 0.2 --hint-weight 0.3 --ratio-loss huber "
        "--decision-clip 0 --mix even --no-bf16 --seed 9 --save-steps 11 --log-steps 13 --max-seconds 60 --device cpu"
    ).split()
    result = call("train", "dynamicvit", "--out", tmp_path, *options)
    assert result.code == 0, result.err
    settings = given["settings"]
    assert (settings.layers, settings.ratios, settings.budgets) == ((2, 4), (0.4, 0.2), ())
    assert (settings.rate, settings.batch, settings.micro, settings.epochs, settings.steps) == (1e-5, 4, 2, 3, 7)
    assert (settings.causal_weight, settings.likeness_weight, settings.token_weight) == (0.5, 0.1, 0.2)
    assert settings.hint_weight == 0.3
    assert (settings.ratio_weight, settings.ratio_loss, settings.decision_clip) == (5.0, "huber", None)
    assert (settings.bf16, settings.seed, settings.save_steps, settings.log_steps) == (False, 9, 11, 13)
    assert given["max_seconds"] == 60.0 and set(given["rows"].mix.values()) == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("dynamicvit --budgets 32/32", "2 of (32, 32) for 3 modules"),
        ("dynamicvit --layers 1/x", "write --layers 1/8/16"),
        ("dynamicvit --data scenes --images x", "--images belongs to an instruction file"),
        ("crossget --budgets 32/16", "32/16 is no single budget"),
        ("crossget --budgets a", "write --budgets"),
        ("crossget --max-seconds 0", "--max-seconds 0 leaves no time"),
    ],
)
def test_wrong_options_are_refused(call: Any, tmp_path: Path, options: str, message: str) -> None:
    name, *more = options.split()
    result = call("train", name, "--out", tmp_path / "run", *more)
    assert result.code != 0 and message in result.err
    assert not (tmp_path / "run").exists()
