"""`foveate train lvpruning`: options reach the training, the shipped model has its own, wrong ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import tiny

import foveate
from foveate.modules.lvpruning import load
from foveate.runs import SETTINGS, make_folder, write_json


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the training was called with; nothing is trained."""
    seen: dict[str, Any] = {}

    def train_lvpruning(base: Any, rows: Any, out: Path, settings: Any, **options: Any) -> Path:
        options.pop("report")({"step": 10, "loss": 0.123456})
        seen.update(base=base, rows=rows, out=out, settings=settings, **options)
        return out / "lvpruning"

    monkeypatch.setattr("foveate.train.lvpruning.train_lvpruning", train_lvpruning)
    return seen


def asked(model: Path, instructions: Any, out: Path) -> list[Any]:
    """Options that name a model, instructions with their pictures, and the folder of the run."""
    return ["--model", model, "--data", instructions[0], "--images", instructions[1], "--out", out]


def test_the_shipped_model_has_its_own_rate_and_says_so(call: Any, given: dict[str, Any], tmp_path: Path) -> None:
    result = call("train", "lvpruning", "--model", "mini", "--data", "scenes", "--out", tmp_path, "--device", "cpu")
    assert (result.code, result.out) == (0, f"{tmp_path / 'lvpruning'}\n")
    settings = given["settings"]
    assert (
        settings.rate > 1e-5
        and f"learning rate {settings.rate:g}, batch {settings.batch}, budgets 0.5/0.3/0.1, " in result.err
    )
    assert "step 10  loss 0.1235\n" in result.err
    assert len(given["rows"]) == settings.steps * settings.batch
    assert (given["name"], given["resume"], given["max_seconds"]) == ("mini", False, None)


def test_who_asks_for_one_set_of_ratios_gets_no_budgets(call: Any, given: dict[str, Any], tmp_path: Path) -> None:
    where = ["--model", "mini", "--data", "scenes", "--out", tmp_path, "--device", "cpu", "--ratios", "0.3/0.2/0.1"]
    result = call("train", "lvpruning", *where)
    assert result.code == 0, result.err
    settings = given["settings"]
    assert (settings.ratios, settings.budgets, settings.even_weight) == ((0.3, 0.2, 0.1), (), 0.0)
    assert settings.causal_weight == 1.0 and "ratios 0.3/0.2/0.1" in result.err


def test_options_reach_the_training(
    call: Any, given: dict[str, Any], folder: Path, instructions: Any, tmp_path: Path
) -> None:
    options = (
        "--layers 1/3 --ratios 0.4/0.2 --rate 1e-5 --batch 4 --micro 2 --epochs 3 --steps 7 --ratio-weight 5 "
        "--causal-weight 0.5 --hint-weight 0.1 "
        "--ratio-loss huber --decision-clip 0.1 --visual-share 0.5 --anneal 0.3 --answers --checkpointing "
        "--no-bf16 --seed 9 --save-steps 11 --log-steps 13 --max-seconds 60 --resume --device cpu"
    ).split()
    data, images = instructions
    where = ["--model", folder, "--data", data, "--images", images, "--out", tmp_path / "run"]
    write_json(make_folder(tmp_path / "run") / SETTINGS, {})
    result = call("train", "lvpruning", *where, *options)
    assert result.code == 0, result.err
    settings = given["settings"]
    assert (settings.layers, settings.ratios, settings.rate) == ((1, 3), (0.4, 0.2), 1e-5)
    assert (settings.batch, settings.micro, settings.epochs, settings.steps) == (4, 2, 3, 7)
    assert (settings.causal_weight, settings.hint_weight) == (0.5, 0.1)
    assert (settings.ratio_weight, settings.ratio_loss, settings.decision_clip) == (5.0, "huber", 0.1)
    assert (
        settings.answers
        and settings.checkpointing
        and not settings.bf16
        and (settings.visual_share, settings.anneal) == (0.5, 0.3)
    )
    assert (settings.seed, settings.save_steps, settings.log_steps) == (9, 11, 13)
    assert (given["resume"], given["max_seconds"]) == (True, 60.0)
    assert "5 entries; left out: 1 with a missing picture\nmissing pictures: gone.png\n" in result.err


def test_options_of_scenes_reach_the_training(call: Any, given: dict[str, Any], tmp_path: Path) -> None:
    options = (
        "--budgets 0.5/0.3/0.1,32/32/32 --even-weight 0.2 --start mini --mix count=2,digit=1 --check-steps 50 "
        "--check-rows 3 --above-random count --steps 4 --batch 2 --pool 2 --hint-weight 1 --device cpu"
    ).split()
    result = call("train", "lvpruning", "--model", "mini", "--data", "scenes", "--out", tmp_path, *options)
    assert result.code == 0, result.err
    settings = given["settings"]
    assert settings.budgets == ((0.5, 0.3, 0.1), (32, 32, 32))
    assert (settings.even_weight, settings.start, settings.check_steps) == (0.2, "mini", 50)
    assert settings.above_random == "count"
    assert given["rows"].mix == {"count": 2.0, "digit": 1.0} and given["rows"].pool == 2
    assert len(given["held_out"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mix digits=1", "unknown kind of question 'digits'; did you mean 'digit'"),
        ("--mix count", "'count' has no number; write count=1"),
        ("--mix count=-1", "'count=-1' is below 0 or infinite"),
        ("--mix count=0", "--mix asks nothing"),
        ("--budgets 0.5/x/0.1", "write --budgets 0.5/0.3/0.1,32/32/32"),
        ("--budgets 0.5/0.3", "2 of (0.5, 0.3) for 3 modules"),
        ("--budgets 0.1/0.3/0.5", "(0.1, 0.3, 0.5) rises"),
        ("--ratios 0.5/0.3/0.1 --even-weight 1", "give budgets= with it"),
        ("--causal-weight 0 --hint-weight 0", "give hint_weight= with it"),
        ("--above-random count", "give --check-steps"),
        ("--check-steps 5 --above-random counts", "unknown kind of question 'counts'; did you mean 'count'"),
        ("--check-steps 5 --check-rows 0", "--check-rows 0 judges nothing"),
    ],
)
def test_what_scenes_cannot_be_asked_is_refused(call: Any, tmp_path: Path, options: str, message: str) -> None:
    where = ["--model", "mini", "--data", "scenes", "--out", tmp_path / "run"]
    result = call("train", "lvpruning", *where, *options.split())
    assert result.code != 0 and message in result.err
    assert not (tmp_path / "run").exists()


def test_other_models_are_trained_as_in_the_paper(
    call: Any, given: dict[str, Any], folder: Path, instructions: Any, tmp_path: Path
) -> None:
    where = asked(folder, instructions, tmp_path / "run")
    assert call("train", "lvpruning", *where, "--device", "cpu").code == 0
    settings = given["settings"]
    assert (settings.rate, settings.batch, settings.ratios) == (2e-6, 64, (0.5, 0.3, 0.1))
    assert (settings.micro, settings.checkpointing) == (None, None)
    assert (
        settings.decision_clip is None
        and settings.steps is None
        and (settings.visual_share, settings.anneal) == (1.0, 0.0)
    )


TEMPLATE = (
    "{% for message in messages %}w3 {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def test_a_run_ends_in_modules(call: Any, instructions: Any, tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path / "model")
    processor = tiny.processor(model)
    processor.chat_template = TEMPLATE
    processor.save_pretrained(tmp_path / "model")
    where = asked(tmp_path / "model", instructions, tmp_path / "run")
    result = call("train", "lvpruning", *where, *"--batch 2 --epochs 2 --rate 1e-3 --no-bf16 --device cpu".split())
    assert result.code == 0, result.err
    assert "2 rows at once, 1 times a step, blocks kept: " in result.err
    modules = load(result.out.strip())
    modules.check(tiny.model().config)
    assert list(modules.config.layers) == [1, 2, 3]
    method = foveate.LVPruning.from_pretrained(str(tmp_path / "run"), keep=(9, 5, 2))
    assert method.count(36) == (9, 5, 2), "the run's folder stands for the modules in it"
    again = call("train", "lvpruning", *where, *"--batch 2 --epochs 2 --rate 1e-3 --no-bf16 --device cpu".split())
    assert (again.code, again.out) == (
        1,
        "",
    ) and "already holds a run; go on with it by --resume, or give another folder" in again.err


def test_what_cannot_be_trained_is_refused_before_anything_is_read(
    call: Any, folder: Path, instructions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint in float16, as most are stored, and a folder that is no place for this run."""
    half = tmp_path / "half"
    tiny.model().half().save_pretrained(half)
    instructions[0].write_text("no JSON")
    monkeypatch.setattr("foveate.inference.loading._weights", lambda *_: pytest.fail("weights were read"))

    def refused(model: Path, *options: Any) -> str:
        where = asked(model, instructions, tmp_path / "run")
        result = call("train", "lvpruning", *where, "--device", "cpu", *options)
        assert (result.code, result.out) == (1, "")
        return result.err

    cannot = "--dtype float16 cannot hold the gradients of masked tokens; load the model with --dtype bfloat16"
    assert refused(half).startswith(f"foveate: {half} is stored as float16, and {cannot}")
    assert refused(folder, "--dtype", "float16").startswith(f"foveate: {cannot}")
    assert "holds no run to go on with; start one there with no --resume" in refused(folder, "--resume")
    write_json(make_folder(tmp_path / "run") / SETTINGS, {})
    assert "already holds a run; go on with it by --resume" in refused(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none.json"], "--data none.json needs --images"),
        (["--data", "none.json", "--images", "."], "--data none.json is no file; give LLaVA's instruction JSON"),
        (["--images", "."], "scenes draw their own pictures"),
        (["--model", "./none", "--steps", "5"], "there is no folder ./none"),
        (["--model", "other"], "--data scenes never ends; give --steps"),
        (["--ratios", "half"], "could not convert string to float: 'half'; write --layers 1/8/16"),
        (["--layers", "1/x"], "write --layers 1/8/16 and --ratios 0.5/0.3/0.1"),
        (["--ratios", "0.5/0.3"], "2 ratios (0.5, 0.3) for 3 layers"),
        (["--ratio-loss", "mae"], "--ratio-loss 'mae' is not among its choices"),
        (["--max-seconds", "0"], "--max-seconds 0 leaves no time"),
        (["--device", "cuda:99"], "torch sees"),
    ],
)
def test_wrong_options_are_refused(
    call: Any, given: dict[str, Any], tmp_path: Path, options: list[str], message: str
) -> None:
    result = call("train", "lvpruning", "--out", tmp_path, *options)
    assert result.code == 2
    assert message in result.err
    assert given == {}


def test_training_without_its_packages_says_what_to_install(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = call("train", "lvpruning", "--out", tmp_path)
    assert result.code == 2 and "training needs accelerate; install foveate[train]" in result.err
