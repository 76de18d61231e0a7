"""Prompts without a picture run as they are, by themselves, beside others and before or after a picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import foveate
from foveate import FoveateError
from foveate.runtime.seams import CACHE

STEPS = 4
METHODS = (
    "image_text_interaction:where=2,attention=received,keep=0.5",
    "tome:keep=0.5",
    "fopru:keep=0.5",
    "fastv:layer=1,keep=0.5",
    "h2o:heavy=0.2,recent=0.2",
    "snapkv:capacity=0.3,window=3",
    "fopru:keep=0.5+fastv:layer=1,keep=0.25+h2o:heavy=0.3,recent=0.2",
)
each_method = pytest.mark.parametrize("method", METHODS)
TOLERANCE = 2e-5


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    settings = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(**given, **settings)


class Notes(BaseStreamer):
    """What a streamer was given."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        pass


def cache_of(out: Any) -> dict[str, Any]:
    return {CACHE: out[CACHE]}


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)


@each_method
@pytest.mark.parametrize("rows", [("6",), ("7", "3")])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"prefill_chunk_size": 4},
                                     {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}])  # fmt: skip
def test_generate_answers_as_the_stock_model(options: dict[str, Any], rows: tuple[str, ...], method: str) -> None:
    """Also with what a method refuses where there are pictures."""
    if len(rows) > 1 and "prompt_lookup_num_tokens" in options:
        pytest.skip("drafts are for one row")
    model = tiny.model()
    given = tiny.inputs(model, *rows)
    expected = generate(model, given, **options)
    with untouched(model), foveate.prune(model, method) as trace:
        assert_same(generate(model, given, **options), expected)
    call = trace.latest
    assert call.images == ()
    assert call.length == call.prompt_length == given["input_ids"].shape[1]
    assert call.budget == call.unpruned
    assert str(call).startswith("no picture: ")


@each_method
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_a_direct_call_is_the_stock_models(padding: str, method: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "7", "3", padding=padding)
    one = tiny.inputs(model, "6")
    own = given["attention_mask"].bool()
    expected, alone = model(**given).logits, model(**one).logits
    labels = given["input_ids"].masked_fill(~own, -100)
    loss = model(**given, labels=labels).loss
    with untouched(model), foveate.prune(model, method) as trace:
        torch.testing.assert_close(model(**given).logits[own], expected[own], atol=TOLERANCE, rtol=0)
        assert torch.equal(model(**one).logits, alone)
        assert torch.equal(model(**one, use_cache=False).logits, alone)
        torch.testing.assert_close(model(**given, labels=labels).loss, loss, atol=1e-6, rtol=0)
        torch.testing.assert_close(model.model(**one).last_hidden_state, model.model(**one).last_hidden_state)
    assert [call.images for call in trace.history] == [()] * 6


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", ["random:keep=0.5", "fastv:layer=1,keep=0.5"])
@torch.no_grad()
def test_every_family(method: str, family: str) -> None:
    model = tiny.model(family)
    given = tiny.inputs(model, "7", "3")
    one = tiny.inputs(model, "6")
    expected, alone = generate(model, given), model(**one).logits
    try:
        handle = foveate.prune(model, method)
    except FoveateError as error:
        pytest.skip(str(error))
    with untouched(model), handle as trace:
        assert_same(generate(model, given), expected)
        torch.testing.assert_close(model(**one).logits, alone, atol=TOLERANCE, rtol=0)
    assert [call.images for call in trace.history] == [(), ()]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_words_beside_rows_with_pictures(method: str) -> None:
    """It answers as alone, and nothing leaves its part of the cache; the others answer as alone, too."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "6", "2i1i5", "9")
    words = [generate(model, tiny.alone(given, row, tiny.IMAGE)) for row in (1, 3)]
    with untouched(model), foveate.prune(model, method) as trace:
        out = generate(model, given)
        assert {image.row for image in trace.images} == {0, 2}
        others = [generate(model, tiny.alone(given, row, tiny.IMAGE)) for row in (0, 2)]
    logits = torch.stack(out.logits)
    for row, alone in zip((1, 3, 0, 2), words + others, strict=True):
        assert torch.equal(out.sequences[row, -STEPS:], alone.sequences[0, -STEPS:])
        torch.testing.assert_close(logits[:, row], torch.stack(alone.logits)[:, 0], atol=5e-5, rtol=0)


@each_method
def test_a_stream_of_words(method: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "6")
    expected, notes = generate(model, given), Notes()
    with foveate.prune(model, method):
        out = generate(model, given, streamer=notes)
    assert_same(out, expected)
    assert torch.equal(notes.values[0], given["input_ids"])
    assert torch.equal(torch.cat(notes.values[1:]), expected.sequences[0, -STEPS:])


@pytest.mark.parametrize("method", METHODS[:-1])
@pytest.mark.parametrize("family", ["llava-1.5", "qwen2.5-vl"])
def test_turns_of_words_before_and_after_a_picture(family: str, method: str) -> None:
    """Words, a picture, words: the first turn is the stock model's; the rest equals one prompt that has it all."""
    model = tiny.model(family)
    first, then = tiny.inputs(model, "6"), tiny.inputs(model, "2i3", seed=1)
    expected = generate(model, first)
    last = torch.tensor([[5, 6, 7]])
    with untouched(model), foveate.prune(model, method) as trace:
        out = generate(model, first)
        assert_same(out, expected)
        ids = torch.cat([out.sequences, then["input_ids"]], dim=1)
        given = {**then, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        types = {name: one for name, one in given.items() if name.endswith("token_type_ids")}
        for name, one in types.items():
            given[name] = torch.nn.functional.pad(one, (out.sequences.shape[1], 0))
        out = generate(model, given, **cache_of(out))
        assert [len(call.images) for call in trace.history] == [0, 1]
        ids = torch.cat([out.sequences, last], dim=1)
        out = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **cache_of(out))
        assert len(trace.history) == 2, "words that follow are no prompt of their own"
        assert out.sequences.shape[1] == ids.shape[1] + STEPS
    if "h2o" in method or "snapkv" in method:
        return  # their reference is the decoder by hand
    whole = given if family == "llava-1.5" else dict(given)
    with foveate.prune(model, method) as together:
        again = generate(model, whole, max_new_tokens=1)
    assert together.images[0].after == trace.images[0].after
    if "image_text" not in method and "fastv" not in method:  # which read words as well
        assert torch.equal(together.images[0].kept, trace.images[0].kept)
        with foveate.prune(model, method):
            once = generate(model, whole)
        ended = ids.shape[1] - 3
        assert torch.equal(once.sequences[:, -STEPS:], ids[:, ended - STEPS : ended])
    assert again.sequences.shape[1] == whole["input_ids"].shape[1] + 1


@each_method
@torch.no_grad()
def test_words_by_hand_before_a_picture(method: str) -> None:
    model = tiny.model()
    words, picture = torch.tensor([[5, 6, 7, 8]]), tiny.inputs(model, "2i3")
    expected = [model(input_ids=words, use_cache=True)]
    expected.append(model(input_ids=torch.tensor([[9]]), **cache_of(expected[0])))
    with foveate.prune(model, method) as trace:
        out = model(input_ids=words, use_cache=True)
        assert torch.equal(out.logits, expected[0].logits)
        out = model(input_ids=torch.tensor([[9]]), **cache_of(out))
        torch.testing.assert_close(out.logits, expected[1].logits, atol=TOLERANCE, rtol=0)
        assert len(trace.history) == 1
        if "+" in method:
            return  # refuses a picture behind a cache that a method on it holds
        both = {"input_ids": picture["input_ids"], "pixel_values": picture["pixel_values"]}
        model(**both, **cache_of(out))
    assert [len(call.images) for call in trace.history] == [0, 1]


def test_a_picture_behind_words_that_a_method_on_the_cache_did_not_see() -> None:
    model = tiny.model()
    words, picture = tiny.inputs(model, "6"), tiny.inputs(model, "2i3")
    pieces = "the words in this cache came in pieces or into a static cache, .*; start with a new cache for the picture"
    static = "h2o:heavy=0.2,recent=0.2 evicts entries, and a static cache cannot shrink; use a dynamic cache"
    with foveate.prune(model, "h2o:heavy=0.2,recent=0.2"):
        for options, message in (({"prefill_chunk_size": 3}, pieces), ({"cache_implementation": "static"}, static)):
            out = generate(model, words, **options)
            ids = torch.cat([out.sequences, picture["input_ids"]], dim=1)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture["pixel_values"]}
            with pytest.raises(FoveateError, match=message):
                generate(model, given, **cache_of(out))
        out = generate(model, words, prefill_chunk_size=3)
        ids = torch.cat([out.sequences, words["input_ids"]], dim=1)
        got = generate(model, {"input_ids": ids}, **cache_of(out))
    assert_same(got, generate(model, {"input_ids": ids}))


def test_pictures_and_placeholders_still_belong_together() -> None:
    model = tiny.model()
    given, words = tiny.inputs(model, "3i4"), tiny.inputs(model, "6")
    pictures = {**words, "pixel_values": given["pixel_values"]}
    message = (
        "pixel_values were given but the prompt has no image: no token 96 among 6; write the image into the prompt"
    )
    with foveate.prune(model, "fopru"):
        for call in (lambda: generate(model, pictures), lambda: model(**pictures)):
            with pytest.raises(FoveateError, match=message):
                call()
