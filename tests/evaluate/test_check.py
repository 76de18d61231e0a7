"""The check of a model: what it finds, and that each of its statements can fail."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor

from foveate import methods
from foveate.core import CacheSelection, FoveateError, Selection
from foveate.evaluate.check import Found, check, find
from foveate.families import family_of
from foveate.methods.h2o import H2O
from foveate.methods.pyramiddrop import PyramidDrop
from foveate.methods.random import Random
from foveate.runtime import support
from foveate.runtime.decoder.cache import timeline_of
from foveate.runtime.seams import CACHE


def checked(model: Any) -> Found:
    return check(model, tiny.inputs(model, "3i4"))


def failed(found: Found) -> list[str]:
    return [outcome.name for outcome in found.outcomes if not outcome.passed]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_family_holds_the_contract(name: str) -> None:
    model = tiny.model(name)
    found = checked(model)
    assert failed(found) == []
    assert (found.family, found.passed, found.assumed) == (name, True, ())
    placeholders = int((tiny.inputs(model, "3i4")["input_ids"] == tiny.IMAGE).sum())
    assert (found.tokens == (placeholders,)) == ("next" not in name and "onevision" not in name), "newlines stay apart"
    halves = [outcome for outcome in found.outcomes if "keeps exactly" in outcome.name]
    # The picture of this family is scaled down, so that its tokens share patches and cannot merge.
    refused = [outcome for outcome in found.outcomes if "says why" in outcome.name]
    assert ["interpolated" in outcome.detail for outcome in refused] == ([True] if name == "llava-onevision" else [])
    row = family_of(model)
    assert len(halves) == 4 - len(refused) - (row.closed_encoder is not None) - (row.closed_decoder is not None)
    names = [outcome.name for outcome in found.outcomes]
    allowed = row.closed_decoder is None
    for statement, count in (
        ("holds its budget", allowed),
        ("at every stage", allowed),
        ("padded batch", 1 + 2 * allowed),
        ("changes nothing in a second turn", 1 + allowed),
        ("as token by token", (1 + allowed) * (not row.two_way)),
    ):
        assert sum(statement in name for name in names) == count
    for outcome in halves:
        half = found.tokens[0] // 2
        assert outcome.detail == f"{found.tokens[0]} -> {half} tokens, {half} asked for"


def test_what_is_found_of_a_model() -> None:
    model = tiny.model()
    found = find(model)
    assert (found.model, found.type, found.family) == ("LlavaForConditionalGeneration", "llava", "llava-1.5")
    assert (found.encoder, found.encoder_blocks, found.read, found.decoder_layers) == ("clip_vision_model", 4, 2, 4)
    family = family_of(model)
    working = support.working_methods(family, family.tower_of(model)[1])
    assert [name for name, why in found.methods.items() if why is None] == working
    assert list(found.methods) == list(methods.names())
    assert "does not have" in str(find(tiny.model(tower="siglip")).methods["fastervlm"])


def test_a_batch_and_several_pictures() -> None:
    model = tiny.model()
    found = check(model, tiny.inputs(model, "2i1i5", "3i4"))
    assert failed(found) == []
    assert found.tokens == (36, 36, 36)


def test_renumbered_positions_are_caught() -> None:
    model = tiny.model()

    def renumber(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
        positions = options["position_ids"]
        return arguments, {**options, "position_ids": torch.arange(positions.shape[1]).expand_as(positions)}

    hook = model.get_decoder().register_forward_pre_hook(renumber, with_kwargs=True)
    found = checked(model)
    hook.remove()
    assert not found.passed
    assert "random:keep=18 keeps the tokens' positions" in failed(found)


def test_a_method_that_keeps_another_number_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Random, "count", lambda self, *_, **__: (17,))
    monkeypatch.setattr(Random, "wanted", lambda self, signals: 18)
    outcome = next(one for one in checked(tiny.model()).outcomes if "random:keep=18 keeps exactly" in one.name)
    assert (outcome.passed, outcome.detail) == (False, "36 -> 18 tokens, 17 asked for")


def test_a_choice_that_changes_from_run_to_run_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Random.select

    def shuffled(self: Random, signals: Any) -> Any:
        return stock(dataclasses.replace(self, seed=int(torch.randint(1000, ()))), signals)

    monkeypatch.setattr(Random, "select", shuffled)
    assert "random:keep=18 repeats itself" in failed(checked(tiny.model()))


def test_features_that_do_not_reach_the_decoder_are_caught() -> None:
    """A model that takes encoded pictures and reads other ones."""
    model = tiny.model()
    stock = model.model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        outputs = options.get("mm_encoder_outputs")
        if outputs and options["position_ids"].shape[1] == 43:
            outputs["image"].pooler_output = [rows + 1.0 for rows in outputs["image"].pooler_output]
        return stock(*arguments, **options)

    model.model.forward = forward
    changes = [0]
    encode = model.model.get_image_features

    def get_image_features(*arguments: Any, **options: Any) -> Any:
        changes[0] += 1
        output = encode(*arguments, **options)
        output.pooler_output = [rows + changes[0] for rows in output.pooler_output]
        return output

    get_image_features.__signature__ = inspect.signature(encode)  # type: ignore[attr-defined]
    model.model.get_image_features = get_image_features
    assert "random:keep=1.0 changes nothing" in failed(checked(model))


def test_a_layer_that_holds_more_than_its_budget_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(H2O, "select", lambda self, signals: CacheSelection(signals.cache.age))
    outcome = next(one for one in checked(tiny.model()).outcomes if one.name == "h2o holds its budget in every layer")
    assert not outcome.passed
    assert outcome.detail.startswith("50 of 43 entries, 8 asked for;"), "43 of the prompt and 7 of the answer"


def test_a_stage_that_keeps_another_number_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = PyramidDrop.select

    def one_less(self: PyramidDrop, signals: Any) -> Selection:
        indices = stock(self, signals).indices
        return Selection([row[:-1] for row in indices] if signals.stage == 2 else indices)

    monkeypatch.setattr(PyramidDrop, "select", one_less)
    outcome = next(one for one in checked(tiny.model()).outcomes if "at every stage" in one.name)
    detail = "36 -> 18 -> 9 -> 3 tokens; layers hold 50 32 23 17 entries, 50 32 23 18 are right"
    assert (outcome.passed, outcome.detail) == (False, detail)


def forgetful(when: Callable[[Tensor, Any], bool]) -> Any:
    """A tiny model whose last decoder layer forgets its mask for some calls, by hidden states and cache."""
    model = tiny.model()
    layer = model.get_decoder().layers[3]

    class Forgetful(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
            if when(hidden_states, options.get(CACHE)):
                options["attention_mask"] = None
            return super().forward(hidden_states, *arguments, **options)

    Forgetful.forward.__signature__ = inspect.signature(type(layer).forward)  # type: ignore[attr-defined]
    layer.__class__ = Forgetful
    return model


def test_padding_that_is_read_is_caught() -> None:
    found = checked(forgetful(lambda hidden, cache: hidden.shape[0] == 2))
    assert failed(found) == [
        f"{name} answers each row of a padded batch as alone" for name in ("random:keep=0.5", "fastv:keep=0.5", "h2o")
    ]


def test_a_later_turn_that_reads_another_past_is_caught() -> None:
    found = checked(forgetful(lambda hidden, cache: hidden.shape[1] == 4 and cache.get_seq_length() > 4))
    assert failed(found) == [
        f"{name} takes a second turn at once as token by token" for name in ("random:keep=0.5", "fastv:keep=0.5")
    ], "without pruning the turn is as wrong"


def test_a_later_turn_that_is_refused_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cache: Any, owner: Any) -> None:
        if timeline_of(cache) is not None:
            raise FoveateError("this cache is another one's")

    monkeypatch.setattr("foveate.runtime.decoder.cache.check_usable", refuse)
    outcomes = [one for one in checked(tiny.model()).outcomes if one.name.endswith("in a second turn")]
    assert [one.detail for one in outcomes] == ["this cache is another one's"] * 2


def test_a_model_that_breaks_is_an_outcome() -> None:
    model = tiny.model()
    seen: list[Tensor] = []

    def explode(module: Any, arguments: Any) -> None:
        seen.append(arguments)
        if len(seen) > 20:
            raise RuntimeError("in the middle")

    hook = model.get_decoder().layers[1].register_forward_pre_hook(explode)
    found = checked(model)
    hook.remove()
    assert any(outcome.detail == "RuntimeError: in the middle" for outcome in found.outcomes)
    assert not found.passed


def test_what_pruning_leaves_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Random.select

    def select(self: Random, signals: Any) -> Any:
        model.get_decoder().register_forward_hook(lambda *_: None)
        return stock(self, signals)

    model = tiny.model()
    monkeypatch.setattr(Random, "select", select)
    found = checked(model)
    assert "the model is untouched" in failed(found)
    assert found.outcomes[-1].detail.startswith("changed: hooks of model.language_model")


def test_what_is_no_vision_language_model() -> None:
    with pytest.raises(FoveateError, match="is no transformers model"):
        find(torch.nn.Linear(2, 2))
