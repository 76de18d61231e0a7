"""What methods must hold to on every family in other calls than one prompt: later turns, beams, caches, forward()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import tiny
from models.untouched import untouched
from packaging.version import Version
from references import agreement
from references.contract import (
    LARGER,
    OTHERS,
    STEPS,
    check_agreement,
    each_attention,
    each_served,
    generate,
    merged_features,
    model_of,
    served,
)

from foveate.core import FoveateError
from foveate.families import family_of
from foveate.runtime.seams import CACHE


@each_served(["fopru", "fastv"], [*OTHERS, *LARGER])
def test_a_second_turn_equals_the_reference(name: str, family: str, asked: Any) -> None:
    """Row 0 speaks on, row 1 shows a picture in its second turn, row 2 its first one; new parts differ in length."""
    model = model_of(family)
    method = served(model, name)
    turns = (("3i4", "2i2", "6"), ("5", "1i3", "2i1"))
    if getattr(model.get_decoder().config, "sliding_window", None):
        turns = (("2i2",), ("1i3",))  # a window counts the padding between two turns, pruned or not
    first, second = tiny.inputs(model, *turns[0]), tiny.inputs(model, *turns[1], seed=1)
    seen = asked(method)
    with tiny.prune(model, method) as trace:
        out = generate(model, first, max_new_tokens=3)
        given, whole = first.continued(out.sequences, second)
        needed = family_of(model).later_turns
        if needed is not None and Version(transformers.__version__) < Version(needed):
            with pytest.raises(FoveateError, match="picture wrongly that comes in a later turn"):
                generate(model, given, **{CACHE: getattr(out, CACHE)})
            return
        out = generate(model, given, **{CACHE: getattr(out, CACHE)})
    assert len(trace.history) == 2
    prefix = first["attention_mask"].sum(dim=1).tolist()
    check_agreement(model, whole, out, trace.history, seen, prefix)
    assert torch.equal(out.sequences[:, :-STEPS], given["input_ids"])


@each_attention
@each_served(["fopru", "fastv", "h2o"])
def test_beams_over_ragged_rows_equal_each_row_alone(name: str, family: str, attn: str) -> None:
    model = model_of(family, attn)
    method = served(model, name)
    rows = ("3i4", "2i1i5", "1i2")
    given = tiny.inputs(model, *rows)
    beams: dict[str, Any] = dict(num_beams=3, num_return_sequences=3, output_scores=True)
    with tiny.prune(model, method) as trace:
        together = generate(model, given, **beams)
        images = trace.images
        for row in range(len(rows)):
            alone = generate(model, given.alone(row), **beams)
            mine = slice(3 * row, 3 * row + 3)
            torch.testing.assert_close(together.sequences_scores[mine], alone.sequences_scores, atol=1e-4, rtol=0)
            assert torch.equal(together.sequences[mine, -STEPS:], alone.sequences[:, -STEPS:])
            for in_batch, by_itself in zip([i for i in images if i.row == row], trace.images, strict=True):
                assert torch.equal(in_batch.kept, by_itself.kept)


@each_served(["fopru", "fastv"])
def test_direct_calls_equal_generation(name: str, family: str) -> None:
    """A prompt and the tokens after it, one call each, give the logits of generate()."""
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, "3i4")
    with tiny.prune(model, method):
        out = generate(model, given)
        step = model(**given, use_cache=True)
        logits, mask = [step.logits[:, -1]], given["attention_mask"]
        for token in out.sequences[0, -STEPS:-1]:
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            step = model(input_ids=token[None, None], attention_mask=mask, **{CACHE: getattr(step, CACHE)})
            logits.append(step.logits[:, -1])
    torch.testing.assert_close(torch.cat(logits), torch.cat(out.logits), atol=agreement.TOLERANCE, rtol=0)


@each_served(["fopru", "fastv"])
def test_a_static_cache_gives_the_same(name: str, family: str) -> None:
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, "3i4", "2i1i5", "6")
    with tiny.prune(model, method):
        dynamic = generate(model, given)
        if name == "fastv" and getattr(model.get_decoder().config, "sliding_window", None):
            with pytest.raises(FoveateError, match="layer 0 slides, and a static sliding cache cannot hold a pruned"):
                generate(model, given, cache_implementation="static")
            return
        static = generate(model, given, cache_implementation="static")
    torch.testing.assert_close(
        torch.stack(static.logits), torch.stack(dynamic.logits), atol=agreement.TOLERANCE, rtol=0
    )


@each_served(["fopru", "fastv"])
def test_padding_on_the_right_gives_each_row_what_it_gets_alone(name: str, family: str) -> None:
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, "3i4", "2i1i5", padding="right")
    with torch.no_grad(), tiny.prune(model, method):
        together = model(**given).logits
        for row in range(2):
            alone = model(**given.alone(row)).logits[0]
            own = together[row, : alone.shape[0]]
            torch.testing.assert_close(own, alone, atol=agreement.TOLERANCE, rtol=0)


@each_served(["fopru", "prumerge", "fastv", "pyramiddrop"], [*OTHERS, *LARGER])
@torch.no_grad()
def test_a_direct_call_answers_in_the_callers_columns(name: str, family: str, asked: Any) -> None:
    """Prompts padded on the left, answers on the right: what a trainer scores, each row by the reference."""
    model = model_of(family)
    method = served(model, name)
    given = tiny.completed(tiny.inputs(model, "3i4", "2i1i5", "6"), 5, 2, 4)
    seen, valid = asked(method), given["attention_mask"].bool()
    with tiny.prune(model, method) as trace:
        out = model(**given, output_hidden_states=True)
        last = model(**given, logits_to_keep=6).logits
    assert out.logits.shape[:2] == valid.shape
    calls = trace.history[:1]
    merged = merged_features(model, seen[: len(seen) // 2], calls)
    for row, prompt in enumerate(agreement.prompts(model, given, *calls, merged=merged)):
        logits, states = agreement.direct(model, prompt, int(valid[row].sum()))
        torch.testing.assert_close(out.logits[row, valid[row]], logits, atol=agreement.TOLERANCE, rtol=0)
        for got, expected in zip(out.hidden_states, states, strict=True):
            torch.testing.assert_close(got[row, valid[row]], expected, atol=agreement.TOLERANCE, rtol=0)
    torch.testing.assert_close(last, out.logits[:, -6:], atol=1e-5, rtol=1e-5)


@each_served(["fopru", "fastv"])
def test_the_model_is_as_before_after_an_exception(name: str, family: str) -> None:
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, "3i4")

    def explode(*_: Any) -> None:
        raise RuntimeError("in the middle")

    for call in (lambda: generate(model, given), lambda: model(**given)):
        with untouched(model):
            hook = model.get_decoder().layers[1].register_forward_pre_hook(explode)
            with pytest.raises(RuntimeError, match="in the middle"), tiny.prune(model, method):
                call()
            hook.remove()
