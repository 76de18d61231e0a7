"""Caches of decoders that lose tokens between layers: static ones, and those in the caller's hands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.conversations import (
    ROWS,
    STEPS,
    Turn,
    answered,
    continued,
    generate,
    logits_of,
    rows_of,
    sizes,
    worst,
)
from models.decoder_stages import MAIN, METHODS, SECOND_TURNS, Fixed
from models.untouched import untouched
from torch import Tensor
from transformers import DynamicCache, StaticCache

import foveate
from foveate import FastV
from foveate.core import FoveateError, Method
from foveate.runtime.seams import CACHE

# ---------------------------------------------------------------------------------------------------------------------
# static caches


@pytest.mark.parametrize("decoder", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("name", MAIN)
def test_a_static_cache_equals_a_dynamic_one(name: str, decoder: str) -> None:
    model = tiny.model(decoder=decoder)
    given = tiny.inputs(model, *ROWS)
    dynamic, turn = answered(model, given, METHODS[name])
    with foveate.prune(model, METHODS[name]):
        static = generate(model, given, cache_implementation="static")
    assert torch.equal(static.sequences[:, -STEPS:], turn.answer)
    assert worst(static, rows_of([turn], model, METHODS[name])) < 1e-4
    widths = [shape[2] for shape in sizes(getattr(static, CACHE))]
    removed = [sizes(getattr(dynamic, CACHE))[0][2] - shape[2] for shape in sizes(getattr(dynamic, CACHE))]
    assert [widths[0] - width for width in widths] == removed


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("ragged", ROWS),
        pytest.param("fastv", ("3i4",), marks=pytest.mark.slow),
        pytest.param("pyramiddrop", ROWS, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_decode_equals_the_reference(name: str, rows: tuple[str, ...]) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *rows)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    torch._dynamo.reset()
    stock = model.forward
    try:
        with foveate.prune(model, METHODS[name]) as trace:
            first = generate(model, given, **{CACHE: cache}, max_new_tokens=1)
            model.forward = torch.compile(model.forward, backend="eager")
            then = generate(model, continued(given, first.sequences, _nothing(given)), **{CACHE: cache})
            call = trace.latest
    finally:
        model.forward = stock
        del model.forward
        torch._dynamo.reset()
    answer = torch.cat([first.sequences[:, -1:], then.sequences[:, -STEPS:]], dim=1)
    rows_ = rows_of([Turn(given, answer, call)], model, METHODS[name])
    assert worst(then, [one[1:] for one in rows_]) < 1e-4


def _nothing(given: dict[str, Tensor]) -> dict[str, Tensor]:
    empty = given["input_ids"][:, :0]
    return {"input_ids": empty, "attention_mask": empty}


@pytest.mark.parametrize("second", SECOND_TURNS)
def test_a_static_cache_goes_through_a_second_turn(second: str) -> None:
    model = tiny.model()
    methods = METHODS["pyramiddrop"]
    first, then = tiny.inputs(model, *ROWS), tiny.inputs(model, *SECOND_TURNS[second], seed=1)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=192)
    with foveate.prune(model, methods) as trace:
        out = generate(model, first, max_new_tokens=3, **{CACHE: cache})
        turns = [Turn(first, out.sequences[:, -3:], trace.latest)]
        out = generate(model, continued(first, out.sequences, then), **{CACHE: cache})
        turns.append(Turn(then, out.sequences[:, -STEPS:], trace.latest if second != "text only" else None))
    assert worst(out, rows_of(turns, model, methods)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# caches in the caller's hands


def step(model: Any, cache: Any, mask: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """One token further by hand: logits (B, V) and the longer mask."""
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    out = model(input_ids=token[:, None], attention_mask=mask, **{CACHE: cache})
    return out.logits[:, -1], mask


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MAIN)
def test_a_loop_by_hand_equals_the_reference(name: str, padding: str) -> None:
    model = tiny.model(decoder="qwen3")
    given = tiny.inputs(model, *ROWS, padding=padding)
    tokens = torch.randint(2, tiny.IMAGE, (3, 4), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), untouched(model), foveate.prune(model, METHODS[name]) as trace:
        out = model(**given)
        call, cache, mask = trace.latest, getattr(out, CACHE), given["attention_mask"]
        steps = []
        for token in tokens[:, :-1].T:
            logits, mask = step(model, cache, mask, token)
            steps.append(logits)
    for row, logits in enumerate(rows_of([Turn(given, tokens, call)], model, METHODS[name])):
        torch.testing.assert_close(torch.stack(steps)[:, row], logits[1:], atol=1e-4, rtol=0)


def test_rows_of_a_cache_are_selected_repeated_and_reordered() -> None:
    model = tiny.model()
    methods = METHODS["ragged"]
    given = tiny.inputs(model, *ROWS)
    tokens = torch.tensor([[5, 6], [7, 8], [9, 10]])
    changes: dict[tuple[int, ...], Any] = {
        (2, 0): lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
        (1, 2, 0): lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])),
    }
    found = []
    with torch.no_grad(), foveate.prune(model, methods) as trace:
        for order, change in changes.items():
            cache, rows = getattr(model(**given), CACHE), torch.tensor(order)
            change(cache)
            found.append(step(model, cache, given["attention_mask"][rows], tokens[rows, 0])[0])
    assert len(trace.history) == 3
    expected = torch.stack(rows_of([Turn(given, tokens, None)], model, methods))[:, 1]
    for logits, order in zip(found, changes, strict=True):
        torch.testing.assert_close(logits, expected[list(order)], atol=1e-4, rtol=0)


def test_a_cache_is_cropped_behind_its_pictures_only() -> None:
    model = tiny.model()
    methods = METHODS["pyramiddrop"]
    given = tiny.inputs(model, "3i6")
    ids, mask = given["input_ids"], given["attention_mask"]
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), foveate.prune(model, methods):
        cache = getattr(model(**given), CACHE)
        _, longer = step(model, cache, mask, torch.tensor([9]))
        cache.crop(-1)
        _, longer = step(model, cache, mask, tokens[:, 0])
        after, _ = step(model, cache, longer, tokens[:, 1])

        cache = getattr(model(**given), CACHE)
        cache.crop(-2)  # the last two words of the prompt
        shorter, _ = step(model, cache, mask[:, :-2], ids[:, -2])
        assert [shape[2] for shape in sizes(cache)] == [44, 26, 17, 12]

        cache = getattr(model(**given), CACHE)
        with pytest.raises(FoveateError, match=r"crop removes 10 .* visual tokens .* reset"):
            cache.crop(-10)
    expected, talk = logits_of([Turn(given, tokens, None)], model, methods, 0)
    torch.testing.assert_close(after[0], expected[2], atol=1e-4, rtol=0)
    torch.testing.assert_close(shorter[0], talk.logits[ids.shape[1] - 2], atol=1e-4, rtol=0)


def test_a_refused_crop_leaves_the_cache_as_it_was() -> None:
    """Block 2 could follow the cut, block 3 cannot."""
    model = tiny.model()
    given = tiny.inputs(model, "3i2")
    methods: list[Method] = [Fixed(kept=tuple(range(20, 36))), FastV(layer=3, keep=1)]
    tokens = torch.tensor([[5, 6]])
    with torch.no_grad(), foveate.prune(model, methods):
        cache = getattr(model(**given), CACHE)
        with pytest.raises(FoveateError, match="layer 3 has dropped"):
            cache.crop(-5)
        logits, _ = step(model, cache, given["attention_mask"], tokens[:, 0])
    expected = rows_of([Turn(given, tokens, None)], model, methods)[0]
    torch.testing.assert_close(logits[0], expected[1], atol=1e-4, rtol=0)


def test_a_cache_that_slides_is_not_cropped() -> None:
    model = tiny.model(decoder="qwen2-mixed")
    with torch.no_grad(), foveate.prune(model, METHODS["fastv"]):
        cache = getattr(model(**tiny.inputs(model, "3i4")), CACHE)
        with pytest.raises(FoveateError, match=r"layer 2 slides and has forgotten all but 7 .* reset"):
            cache.crop(-1)


def test_a_reset_cache_starts_anew() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, METHODS["ragged"]):
        cache = DynamicCache(config=model.config.get_text_config())
        first = generate(model, given, **{CACHE: cache})
        cache.reset()
        again = generate(model, given, **{CACHE: cache})
    assert torch.equal(torch.stack(first.logits), torch.stack(again.logits))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_without_its_handle_is_refused(kind: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    handle = foveate.prune(model, METHODS["fastv"])
    with handle:
        out = generate(model, given, cache_implementation=kind)
    cache = getattr(out, CACHE)
    longer = torch.cat([given["attention_mask"], torch.ones(3, STEPS + 1, dtype=torch.int64)], dim=1)
    ids = torch.cat([out.sequences, out.sequences[:, -1:]], dim=1)
    with pytest.raises(FoveateError, match="handle that has been stopped"):
        model(input_ids=ids[:, -1:], attention_mask=longer, **{CACHE: cache})
    with pytest.raises(FoveateError, match="handle that has been stopped"):
        model.generate(input_ids=ids, attention_mask=longer, **{CACHE: cache}, max_new_tokens=1)
    with foveate.prune(model, METHODS["fastv"]), pytest.raises(FoveateError, match=r"stopped|another handle"):
        model.generate(input_ids=ids, attention_mask=longer, **{CACHE: cache}, max_new_tokens=1)
    with handle:  # which makes it usable again
        if kind == "dynamic":  # the static one was allocated for this answer alone
            mask = longer[:, :-1]
            model.generate(input_ids=ids[:, :-1], attention_mask=mask, **{CACHE: cache}, max_new_tokens=1)


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def test_a_static_cache_of_a_sliding_decoder_is_refused() -> None:
    model = tiny.model(decoder="mistral-sliding")
    message = r"slides.*use a dynamic cache"
    with untouched(model), foveate.prune(model, "fastv:layer=1"), pytest.raises(FoveateError, match=message):
        generate(model, tiny.inputs(model, "3i4"), cache_implementation="static")
