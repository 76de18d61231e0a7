"""What every method must hold to on every family; a new file in methods or a new row of families is covered unasked."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched
from references import agreement, reference
from references.contract import ATTENTION, RUNNABLE, SITUATIONS, at
from torch import Tensor

import foveate
from foveate import families, methods
from foveate.core import Method, Selection, Signals
from foveate.runtime.seams import CACHE
from foveate.trace import Call

STEPS = 8
each_method = pytest.mark.parametrize("name", RUNNABLE)
# The reference deletes columns before the decoder and inside it.
each_with_reference = pytest.mark.parametrize("name", [name for name in RUNNABLE if name in at("input", "layer")])
each_with_budget = pytest.mark.parametrize(
    "name", [name for name in RUNNABLE if agreement.keeping_all(methods.get(name).example()) is not None]
)
# On the cache nothing leaves before the first token of the answer.
each_evictor = pytest.mark.parametrize("name", [name for name in RUNNABLE if name in at("cache")])
# The whole product runs on one family; families/test_contracts.py takes samples of it on every other.
each_family = pytest.mark.parametrize("family", tiny.FAMILIES[:1])
each_attention = pytest.mark.parametrize("attn", ATTENTION)


def model_of(family: str, attn: str = "sdpa") -> Any:
    """A tiny model whose encoder is deep enough for methods that let some of its blocks run in full."""
    return tiny.model(family, attn=attn, blocks=6)


def example(name: str, model: Any) -> Method:
    return methods.get(name).example(model.config)


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    """A greedy answer, or whatever `options` make of it, with its logits."""
    settings = dict(max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
    return model.generate(**given, **{**settings, **options})


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Record what a method answers: the reference takes merged features from there."""

    def record(method: Method) -> list[Selection]:
        seen: list[Selection] = []
        for kind in {type(part) for part in method.parts()}:
            stock = kind.select

            def select(self: Method, signals: Signals, stock: Any = stock) -> Selection:
                seen.append(stock(self, signals))
                return seen[-1]

            monkeypatch.setattr(kind, "select", select)
        return seen

    return record


def merged_features(model: Any, seen: list[Selection], calls: list[Call]) -> list[list[Tensor] | None]:
    """For each call, what stands in for the tokens of its images, as the decoder is to see it."""
    stages = calls[0].images[0].stages
    assert len(seen) == len(stages) * len(calls), "one answer per stage: images of one size are asked about together"
    before = sum(stage.layer is None for stage in stages)
    found: list[list[Tensor] | None] = []
    for call in range(len(calls)):
        last = seen[call * len(stages) + before - 1] if before else None
        if last is None or last.features is None:
            found.append(None)
        elif last.space == "projected":
            found.append(list(last.features))
        else:
            found.append([reference.project(model, one) for one in last.features])
    return found


def test_every_family_has_a_tiny_model() -> None:
    assert set(tiny.FAMILIES) == {family.name for family in families.FAMILIES}


@each_with_reference
@each_family
@each_attention
@pytest.mark.parametrize("situation", SITUATIONS)
def test_decoding_equals_the_reference_without_cache(
    name: str, family: str, attn: str, situation: str, selections: Any
) -> None:
    model = model_of(family, attn)
    given = tiny.inputs(model, *SITUATIONS[situation])
    method = example(name, model)
    seen = selections(method)
    with untouched(model), tiny.prune(model, method) as trace:
        out = generate(model, given)
    merged = merged_features(model, seen, trace.history)
    rows = agreement.prompts(model, given, trace.latest, merged=merged)
    assert agreement.worst(model, rows, out, STEPS) < agreement.TOLERANCE
    assert torch.equal(
        out.sequences[:, -STEPS:], torch.stack([reference.greedy(model, prompt, STEPS) for prompt in rows])
    )
    shifted = agreement.prompts(model, given, trace.latest, merged=merged, renumber=True)
    assert agreement.worst(model, shifted, out, STEPS) > 0.1, "renumbered positions must be told apart"


@each_evictor
@each_family
@each_attention
@pytest.mark.parametrize("situation", SITUATIONS)
def test_eviction_leaves_the_first_token_exact(name: str, family: str, attn: str, situation: str) -> None:
    model = model_of(family, attn)
    given = tiny.inputs(model, *SITUATIONS[situation])
    unpruned = generate(model, given)
    with untouched(model), tiny.prune(model, example(name, model)):
        out = generate(model, given)
    torch.testing.assert_close(out.logits[0], unpruned.logits[0], atol=agreement.TOLERANCE, rtol=0)


@each_with_reference
@each_family
@each_attention
def test_a_second_turn_equals_the_reference(name: str, family: str, attn: str, selections: Any) -> None:
    """Row 0 speaks on, row 1 shows a picture in its second turn, row 2 its first one; new parts differ in length."""
    model = model_of(family, attn)
    first, second = tiny.inputs(model, "3i4", "2i2", "6"), tiny.inputs(model, "5", "1i3", "2i1", seed=1)
    method = example(name, model)
    seen = selections(method)
    with untouched(model), tiny.prune(model, method) as trace:
        out = generate(model, first, max_new_tokens=3)
        given = continued(first, out.sequences, second)
        out = generate(model, {**given, "pixel_values": second["pixel_values"]}, **{CACHE: getattr(out, CACHE)})
    assert len(trace.history) == 2
    merged = merged_features(model, seen, trace.history)
    whole = {**given, "pixel_values": turns_in_row_order(model, first, second)}
    rows = agreement.prompts(model, whole, *trace.history, merged=merged)
    assert agreement.worst(model, rows, out, STEPS) < agreement.TOLERANCE
    assert torch.equal(out.sequences[:, :-STEPS], given["input_ids"])


def continued(first: dict[str, Tensor], answer: Tensor, second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ids and mask of a whole conversation: the first prompt, its answer, the second prompt."""
    mask = [first["attention_mask"], torch.ones_like(answer[:, first["input_ids"].shape[1] :])]
    return {
        "input_ids": torch.cat([answer, second["input_ids"]], dim=1),
        "attention_mask": torch.cat([*mask, second["attention_mask"]], dim=1),
    }


def turns_in_row_order(model: Any, *turns: dict[str, Tensor]) -> Tensor:
    """The pictures of several turns, those of row 0 first."""
    token = model.config.image_token_id
    found = [
        tiny.alone(turn, row, token).get("pixel_values")
        for row in range(turns[0]["input_ids"].shape[0])
        for turn in turns
    ]
    return torch.cat([one for one in found if one is not None])


@each_method
@each_family
@each_attention
def test_beams_over_ragged_rows_equal_each_row_alone(name: str, family: str, attn: str) -> None:
    model = model_of(family, attn)
    rows = ("3i4", "2i1i5", "1i2")
    given = tiny.inputs(model, *rows)
    beams: dict[str, Any] = dict(num_beams=3, num_return_sequences=3, output_scores=True)
    with tiny.prune(model, example(name, model)) as trace:
        together = generate(model, given, **beams)
        images = trace.images
        for row in range(len(rows)):
            alone = generate(model, tiny.alone(given, row, model.config.image_token_id), **beams)
            mine = slice(3 * row, 3 * row + 3)
            assert torch.equal(together.sequences[mine, -STEPS:], alone.sequences[:, -STEPS:])
            torch.testing.assert_close(together.sequences_scores[mine], alone.sequences_scores, atol=1e-5, rtol=0)
            for in_batch, by_itself in zip([i for i in images if i.row == row], trace.images, strict=True):
                assert torch.equal(in_batch.kept, by_itself.kept)


@each_with_budget
@each_family
@each_attention
def test_keeping_everything_changes_nothing(name: str, family: str, attn: str) -> None:
    model = model_of(family, attn)
    method = agreement.keeping_all(example(name, model))
    assert method is not None
    given = tiny.inputs(model, "3i4", "2i1i5", "6")
    unpruned = generate(model, given)
    with tiny.prune(model, method) as trace:
        pruned = generate(model, given)
        direct = model(**given).logits
    assert [image.after for image in trace.images] == [tiny.TOKENS] * 3
    assert torch.equal(pruned.sequences, unpruned.sequences)
    torch.testing.assert_close(torch.stack(pruned.logits), torch.stack(unpruned.logits), atol=1e-5, rtol=0)
    valid = given["attention_mask"].bool()
    torch.testing.assert_close(direct[valid], model(**given).logits[valid], atol=1e-5, rtol=0)


@each_method
@each_family
def test_exactly_count_tokens_stay_and_no_text_leaves(name: str, family: str) -> None:
    model = model_of(family)
    given = tiny.inputs(model, "3i4", "2i1i5", "6")
    method = example(name, model)
    counted = [part.count(tiny.TOKENS, tiny.GRID) for part in method.parts()]
    with tiny.prune(model, method) as trace:
        generate(model, given, max_new_tokens=1)
    for image in trace.images:
        if None not in counted:
            assert [stage.after for stage in image.stages] == [left for count in counted for left in count or ()]
        assert all(stage.kept.numel() == stage.after for stage in image.stages)
        assert all(later.before == earlier.after for earlier, later in pairwise(image.stages))
    ids, valid = given["input_ids"], given["attention_mask"].bool()
    for row, index in enumerate(trace.index):
        reached = set(index[index >= 0].tolist())
        text = (valid[row] & (ids[row] != model.config.image_token_id)).nonzero().squeeze(-1)
        assert set(text.tolist()) <= reached
        visual = sum(image.after for image in trace.images if image.row == row)
        if all(stage.layer is None for image in trace.images for stage in image.stages):
            assert len(reached) == text.numel() + visual


@each_with_reference
@each_family
def test_answers_that_are_taught_choose_nothing(name: str, family: str) -> None:
    """In training a prompt holds its answer, which at inference is still to be written: the same tokens stay."""
    model = model_of(family)
    asked = tiny.inputs(model, "3i4", "2i1i5")
    taught = tiny.completed(asked, 3, 2)
    labels = taught["input_ids"].masked_fill(taught["attention_mask"] == 0, -100)
    labels[:, : asked["input_ids"].shape[1]] = -100
    with torch.no_grad(), tiny.prune(model, example(name, model)) as trace:
        model(**asked)
        before = [stage.kept for image in trace.images for stage in image.stages]
        model(**taught, labels=labels)
        after = [stage.kept for image in trace.images for stage in image.stages]
    assert before and len(before) == len(after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@each_method
@each_family
def test_a_second_run_equals_the_first(name: str, family: str) -> None:
    model = model_of(family)
    given = tiny.inputs(model, "3i4", "2i1i5", "6")
    before = {key: value.clone() for key, value in given.items()}
    method = example(name, model)
    with tiny.prune(model, method) as trace:
        first = generate(model, given)
        second = generate(model, given)
    assert len(trace.history) == 2
    with tiny.prune(model, method):
        third = generate(model, given)
    for other in (second, third):
        assert torch.equal(first.sequences, other.sequences)
        assert torch.equal(torch.stack(first.logits), torch.stack(other.logits))
    assert all(torch.equal(value, before[key]) for key, value in given.items()), "the caller's tensors are theirs"


@each_method
@each_family
def test_the_model_is_as_before_after_an_exception(name: str, family: str) -> None:
    model = model_of(family)
    given = tiny.inputs(model, "3i4")
    unpruned = generate(model, given)

    def explode(*_: Any) -> None:
        raise RuntimeError("in the middle")

    for call in (lambda: generate(model, given), lambda: model(**given)):
        for module in (model.lm_head, model.get_decoder().layers[1]):
            with untouched(model):
                hook = module.register_forward_pre_hook(explode)
                with pytest.raises(RuntimeError, match="in the middle"), tiny.prune(model, example(name, model)):
                    call()
                hook.remove()
    assert torch.equal(generate(model, given).sequences, unpruned.sequences)


@each_method
@each_family
def test_the_trace_is_ready_for_json_and_for_reading(name: str, family: str) -> None:
    import json

    model = model_of(family)
    method = example(name, model)
    with tiny.prune(model, method) as trace:
        generate(model, tiny.inputs(model, "3i4", "2i1i5"), max_new_tokens=1)
    stored = json.loads(json.dumps(trace.to_dict()))
    assert [image["original"] for image in stored["images"]] == [tiny.TOKENS] * 3
    assert [stage["kept"] for stage in stored["images"][0]["stages"]] == [
        stage.kept.tolist() for stage in trace.images[0].stages
    ]
    counts = [tiny.TOKENS, *(stage.after for stage in trace.images[0].stages)]
    assert " -> ".join(map(str, counts)) in str(trace)
    for stage in trace.images[0].stages:
        assert foveate.spec.parse(stage.method) in method.parts()


@each_method
def test_a_method_is_a_frozen_dataclass_that_describes_itself(name: str) -> None:
    kind = methods.get(name)
    made = kind.example()
    assert dataclasses.is_dataclass(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.paper = "another"  # type: ignore[misc]
    first = (kind.__doc__ or "").splitlines()[0]
    assert first.startswith(f"{kind.__name__}: ") and first.endswith(".")
    assert made == kind.example(), "an example is the same each time"
