"""Training DynamicViT and CrossGET on a tiny model: what it leaves and learns, going on after a kill, and refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from models.training_rows import Dying, Few, Killed
from models.untouched import untouched
from safetensors.torch import load_file

import foveate
from foveate.core import FoveateError
from foveate.modules import crossget as tokens
from foveate.modules import dynamicvit as predictors
from foveate.train import budgets, soft_encoder
from foveate.train.conversations import Row
from foveate.train.crossget import Merging, train_crossget
from foveate.train.crossget import Settings as CrossGETSettings
from foveate.train.dynamicvit import Settings as DynamicViTSettings
from foveate.train.dynamicvit import train_dynamicvit
from foveate.train.soft_encoder import SoftEncoder, Weights

COMMON: dict[str, Any] = dict(batch=4, micro=2, steps=4, bf16=False, save_steps=2, log_steps=1, seed=3)
DYNAMICVIT = DynamicViTSettings(layers=(1, 2), ratios=(0.5, 0.25), **COMMON)
CROSSGET = CrossGETSettings(budgets=((12,), (0.5,)), **COMMON)
BOTH: list[Any] = [
    pytest.param(train_dynamicvit, DYNAMICVIT, "dynamicvit", id="dynamicvit"),
    pytest.param(train_crossget, CROSSGET, "crossget", id="crossget"),
]
ONE_WEIGHT = Weights(causal=1.0, ratio=0.0, likeness=0.0, tokens=0.0)

Train = Callable[..., Path]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def batch(*rows: str) -> dict[str, torch.Tensor]:
    """Prompts whose last words are the answers."""
    given = tiny.inputs(tiny.model(), *rows)
    labels = given["input_ids"].clone()
    labels[:, :-2] = -100
    return {**given, "labels": labels}


@pytest.mark.parametrize(("train", "settings", "name"), BOTH)
def test_a_run_leaves_modules_that_prune(train: Train, settings: Any, name: str, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    model = tiny.model()
    with untouched(model):
        folder = train(model, Few(), tmp_path / "run", settings, name="tiny", report=lines.append)
    assert folder == tmp_path / "run" / name
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    card = (folder / "README.md").read_text()
    assert "for tiny" in card and "4 steps of 4 rows (few)" in card
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(0 < line["kept_1"] <= 1 and line["causal"] > 0 for line in steps)
    method: Any = (
        foveate.DynamicViT.from_pretrained(str(folder), keep=(10, 5))
        if name == "dynamicvit"
        else foveate.CrossGET.from_pretrained(str(folder), keep=6)
    )
    with foveate.prune(model, method) as trace:
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
    assert trace.images[0].after == (5 if name == "dynamicvit" else 6)


@pytest.mark.parametrize(("train", "settings", "name"), BOTH)
def test_a_killed_run_goes_on_as_if_it_had_not(train: Train, settings: Any, name: str, tmp_path: Path) -> None:
    """Each step reads four rows; the run dies in its fourth step, after the checkpoint of the second."""
    whole = weights(train(tiny.model(), Few(), tmp_path / "whole", settings))
    with pytest.raises(Killed):
        train(tiny.model(), Dying(14), tmp_path / "run", settings)
    assert not (tmp_path / "run" / name).exists()
    resumed = weights(train(tiny.model(), Few(), tmp_path / "run", settings, resume=True))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    changed = dataclasses.replace(settings, rate=0.5)
    with pytest.raises(FoveateError, match="begun with rate="):
        train(tiny.model(), Few(), tmp_path / "run", changed, resume=True)


@pytest.mark.parametrize(("train", "settings", "name"), BOTH)
def test_a_run_goes_on_from_trained_modules(train: Train, settings: Any, name: str, tmp_path: Path) -> None:
    first = train(tiny.model(), Few(), tmp_path / "first", settings)
    still = dataclasses.replace(settings, start=str(first), rate=1e-12, steps=1)
    second = train(tiny.model(), Few(), tmp_path / "second", still)
    for key, value in weights(first).items():
        torch.testing.assert_close(weights(second)[key], value)
    with pytest.raises(FoveateError, match="num_hidden_layers=4, not 5"):
        train(tiny.model(blocks=5), Few(), tmp_path / "third", still)


def test_predictors_learn_to_keep_what_is_asked_for(tmp_path: Path) -> None:
    """Untrained ones keep about half and half of that; asked for a quarter and a twentieth, the whole loss falls."""
    lines: list[dict[str, Any]] = []
    settings = dataclasses.replace(DYNAMICVIT, ratios=(0.25, 0.05), rate=2e-2, steps=20, ratio_weight=200.0)
    train_dynamicvit(tiny.model(), Few(80), tmp_path / "run", settings, report=lines.append)
    steps = [line for line in lines if "likeness" in line]
    assert all({"causal", "ratio", "likeness", "tokens"} <= line.keys() for line in steps)
    early, late = steps[:4], steps[-4:]
    assert sum(line["loss"] for line in late) < 0.8 * sum(line["loss"] for line in early)
    assert sum(line["ratio"] for line in late) < 0.5 * sum(line["ratio"] for line in early)


def test_told_budgets_are_met_from_the_start(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    settings = dataclasses.replace(DYNAMICVIT, budgets=((18, 9), (6, 3)), decision_clip=0.1, batch=8, micro=8)
    train_dynamicvit(tiny.model(), Few(), tmp_path / "run", settings, report=lines.append)
    for line in (line for line in lines if "ratio" in line):
        aims = min(((18, 9), (6, 3)), key=lambda aim: abs(aim[0] - 36 * line["kept_1"]))
        assert 36 * line["kept_1"] == pytest.approx(aims[0], abs=3.5) and 36 * line["kept_2"] < aims[1] + 3


class Hinted(Few):
    """Rows that say where things are: in some columns of the picture."""

    def __getitem__(self, number: int) -> Row:
        wanted = torch.zeros(1, tiny.TOKENS, dtype=torch.int8)
        wanted[:, ::6], wanted[:, 1::6] = 1, -1
        return dataclasses.replace(super().__getitem__(number), wanted=wanted)


def test_hints_alone_teach_without_answers(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    settings = dataclasses.replace(
        DYNAMICVIT, budgets=((12, 4),), causal_weight=0.0, likeness_weight=0.0, token_weight=0.0, hint_weight=1.0,
        rate=1e-2, steps=10,
    )  # fmt: skip
    train_dynamicvit(tiny.model(), Hinted(), tmp_path / "run", settings, report=lines.append)
    steps = [line for line in lines if "hint" in line]
    assert len(steps) == 10 and steps[-1]["hint"] < steps[0]["hint"]
    assert all("causal" not in line and line["kept_1"] == pytest.approx(12 / 36) for line in steps)
    with pytest.raises(FoveateError, match="hints alone teach, and these rows give none"):
        train_dynamicvit(tiny.model(), Few(), tmp_path / "none", settings)


def test_cross_tokens_learn_their_rows(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    settings = dataclasses.replace(CROSSGET, budgets=((12,),), rate=0.1, steps=8, batch=4, epochs=8)
    folder = train_crossget(tiny.model(), Few(4), tmp_path / "run", settings, report=lines.append)
    losses = [line["causal"] for line in lines if "causal" in line]
    assert losses[-1] < losses[0]
    assert all(line["kept_1"] == pytest.approx(12 / 36) for line in lines if "kept_1" in line)
    trained = tokens.load(folder).tokens
    read = 2  # of four blocks the projector reads the third; the vector of the last is never used
    assert (trained[: read + 1].abs().amax(dim=1) > 0).all() and trained[read + 1].abs().max() == 0


def test_without_budgets_as_many_patches_merge_as_in_the_authors_code(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    settings = dataclasses.replace(CROSSGET, budgets=(), steps=1)
    train_crossget(tiny.model(), Few(), tmp_path / "run", settings, report=lines.append)
    # In three blocks, of what is left at most half; the cross token joins them.
    assert lines[0]["kept_1"] == pytest.approx((36 - 13 - 11 - 6 + 1) / 36)


def test_soft_masks_are_what_the_pruned_model_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping what inference keeps, the answers' loss is that of the model whose patches are gone."""
    model = tiny.model(attn="eager")
    config = predictors.DynamicViTConfig(width=32, blocks=4, layers=[1, 2])
    modules = predictors.build(config, seed=1)
    monkeypatch.setattr(
        soft_encoder, "shared", lambda gap, odds, ranks, left, count, *_: budgets.shared(gap, odds, ranks, left, count)
    )
    made = SoftEncoder(model, modules, (12, 5), ONE_WEIGHT, told=True)
    given = batch("3i4", "2i9")
    found = made(**given)
    assert found["kept"].tolist() == pytest.approx([12 / 36, 5 / 36])
    method = foveate.DynamicViT(layers=(1, 2), keep=(12, 5), path="random")
    object.__setattr__(method, "modules", modules)
    with torch.no_grad(), foveate.prune(model, method):
        expected = model(**given).loss
    assert found["causal"].item() == pytest.approx(expected.item(), abs=1e-5)
    with torch.no_grad():
        assert abs(model(**given).loss.item() - expected.item()) > 1e-4, "and not that of the whole model"


def test_cross_tokens_train_in_the_model_as_it_is_pruned() -> None:
    model = tiny.model()
    modules = tokens.CrossGETTokens(tokens.CrossGETConfig(width=32, blocks=4)).train()
    with torch.no_grad():
        modules.tokens.normal_(generator=torch.Generator().manual_seed(0))
    made = Merging(model, modules)
    made.ratios = (14,)
    given = batch("3i4", "2i9")
    with torch.no_grad(), foveate.prune(model, foveate.CrossGET.of(modules, keep=14)):
        expected = model(**given).loss
    loss = made(**given)["loss"]
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    loss.backward()
    assert modules.tokens.grad is not None and modules.tokens.grad[:3].abs().amax(dim=1).min() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(DYNAMICVIT, ratios=(0.5,)), r"1 ratios \(0.5,\) for 2 layers"),
        (lambda: dataclasses.replace(DYNAMICVIT, likeness_weight=-1.0), "likeness_weight=-1.0 is below 0"),
        (
            lambda: dataclasses.replace(DYNAMICVIT, causal_weight=0.0, likeness_weight=0.0, token_weight=0.0),
            "are all 0; give one",
        ),
        (lambda: dataclasses.replace(DYNAMICVIT, budgets=((4, 9),)), "rises, but a token that has left"),
        (lambda: dataclasses.replace(CROSSGET, budgets=((9, 4),)), "9/4 is no single budget"),
        (lambda: dataclasses.replace(CROSSGET, budgets=((0,),)), "budgets: 0"),
        (lambda: dataclasses.replace(CROSSGET, micro=0), "micro=0 is below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make()


@pytest.mark.parametrize(
    ("train", "model", "settings", "message"),
    [
        (train_dynamicvit, lambda: tiny.model("qwen2-vl"), DYNAMICVIT, "cannot be trained inside its encoder"),
        (train_dynamicvit, lambda: tiny.model("llava-next"), DYNAMICVIT, "cannot be trained inside its encoder"),
        (train_dynamicvit, tiny.model, dataclasses.replace(DYNAMICVIT, layers=(1, 3)), "the deepest is 2"),
        (train_dynamicvit, tiny.model, dataclasses.replace(DYNAMICVIT, batch=5), "nearest: batch=4"),
        (train_crossget, lambda: tiny.model(tower="siglip"), CROSSGET, "cross"),
        (train_crossget, tiny.model, dataclasses.replace(CROSSGET, budgets=((2,),)), "the least"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    train: Train, model: Callable[[], Any], settings: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FoveateError, match=message):
        train(model(), Few(), tmp_path / "run", settings)
    assert not list((tmp_path / "run").glob("*/model.safetensors"))
