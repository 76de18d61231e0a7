"""Pruning between decoder layers against a decoder that never forgets, caches or pads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.conversations import (
    ATTENTION,
    ROWS,
    STEPS,
    Turn,
    answered,
    continued,
    each_decoder,
    generate,
    held_by,
    logits_of,
    made,
    rows_of,
    sizes,
    wide,
    worst,
)
from models.decoder_stages import MAIN, METHODS, SECOND_TURNS, SLIDING, Fixed
from models.untouched import untouched

import foveate
from foveate import FastV, FoPru, PyramidDrop, SparseVLM
from foveate.core import FoveateError, Method
from foveate.runtime.seams import CACHE


@wide({"llama": tuple(METHODS), "mistral, wide window": MAIN, "qwen2-mixed": MAIN, "qwen3": MAIN[:1]}, METHODS)
def test_a_padded_batch_equals_the_reference(name: str, decoder: str, attn: str) -> None:
    model = made(decoder, attn)
    out, turn = answered(model, tiny.inputs(model, *ROWS), METHODS[name])
    assert worst(out, rows_of([turn], model, METHODS[name])) < 1e-4
    if decoder not in SLIDING:  # through a short window nobody sees a picture from behind it
        assert worst(out, rows_of([turn], model, METHODS[name], renumber=True)) > 0.1


@pytest.mark.parametrize("attn", ATTENTION)
@each_decoder("llama", "mistral, wide window")
def test_a_prompt_without_padding_and_mask_equals_the_reference(decoder: str, attn: str) -> None:
    model = made(decoder, attn)
    methods = METHODS["pyramiddrop"]
    given = tiny.inputs(model, "9i12", batch_mask=False)
    with foveate.prune(model, methods):
        out = generate(model, given)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    turn = Turn(given, out.sequences[:, -STEPS:], None)
    assert worst(out, rows_of([turn], model, methods)) < 1e-4


@wide({"llama": MAIN, "mistral, wide window": MAIN[:1]}, MAIN)
def test_sampled_answers_equal_the_reference(name: str, decoder: str, attn: str) -> None:
    """Two answers per row, each with a cache of its own."""
    model = made(decoder, attn)
    torch.manual_seed(7)
    out, turn = answered(
        model, tiny.inputs(model, *ROWS), METHODS[name], do_sample=True, num_return_sequences=2, temperature=2.0
    )
    assert not torch.equal(turn.answer[0], turn.answer[1])
    assert worst(out, rows_of([turn], model, METHODS[name])) < 1e-4


@wide({"llama": MAIN, "mistral, wide window": MAIN[:1]}, MAIN)
def test_beams_have_the_probabilities_of_the_reference(name: str, decoder: str, attn: str) -> None:
    model = made(decoder, attn)
    beams = dict(num_beams=3, num_return_sequences=2, output_scores=True, length_penalty=0.0)
    out, turn = answered(model, tiny.inputs(model, *ROWS), METHODS[name], **beams)
    for row, logits in enumerate(rows_of([turn], model, METHODS[name])):
        expected = logits.log_softmax(dim=-1).gather(1, turn.answer[row][:, None]).sum()
        assert abs(expected - out.sequences_scores[row]) < 1e-4


@pytest.mark.parametrize("second", SECOND_TURNS)
@wide({"llama": MAIN, "mistral, wide window": MAIN[:2], "qwen2-mixed": MAIN[:2]}, (*MAIN, "fastv+pyramiddrop"))
def test_a_second_turn_equals_the_reference(name: str, decoder: str, attn: str, second: str) -> None:
    model = made(decoder, attn)
    rows = SECOND_TURNS[second]
    if "window" in decoder or decoder in SLIDING:  # padding in the middle is within stock windows
        rows = ("4", "4", "4") if second == "text only" else ("1i3", "2i2", "3i1")
    first = tiny.inputs(model, *ROWS)
    then = tiny.inputs(model, *rows, seed=1)
    with untouched(model), foveate.prune(model, METHODS[name]) as trace:
        out = generate(model, first, max_new_tokens=3)
        turns = [Turn(first, out.sequences[:, -3:], trace.latest)]
        before = len(trace.history)
        out = generate(model, continued(first, out.sequences, then), **{CACHE: getattr(out, CACHE)})
        turns.append(Turn(then, out.sequences[:, -STEPS:], trace.latest if len(trace.history) > before else None))
    assert worst(out, rows_of(turns, model, METHODS[name])) < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_row_in_a_batch_equals_the_row_alone(name: str) -> None:
    model = tiny.model(decoder="qwen3")
    given = tiny.inputs(model, *ROWS, "1i7")
    together, turn = answered(model, given, METHODS[name])
    for row in range(4):
        if row == 2:
            continue  # a prompt without an image is refused by itself
        alone, single = answered(model, tiny.alone(given, row, tiny.IMAGE), METHODS[name])
        assert torch.equal(turn.answer[row : row + 1], single.answer)
        difference = torch.stack(together.logits)[:, row] - torch.stack(alone.logits)[:, 0]
        assert difference.abs().max() < 2e-5
        mine = [image for image in turn.call.images if image.row == row]
        for in_batch, by_itself in zip(mine, single.call.images, strict=True):
            assert [s.kept.tolist() for s in in_batch.stages] == [s.kept.tolist() for s in by_itself.stages]


@pytest.mark.parametrize("attn", ATTENTION)
@each_decoder("llama", "mistral, wide window")
def test_keeping_everything_is_bit_identical(decoder: str, attn: str) -> None:
    model = made(decoder, attn)
    given = tiny.inputs(model, *ROWS)
    stock = generate(model, given)
    for method in (FastV(layer=1, keep=1.0), PyramidDrop(layers=(1, 2), keep=(1.0, 1.0)),
                   SparseVLM(layers=(1, 2), keep=(1.0, 1.0), recycle=True)):  # fmt: skip
        out, _ = answered(model, given, [method])
        assert torch.equal(torch.stack(out.logits), torch.stack(stock.logits))
        assert sizes(getattr(out, CACHE)) == sizes(getattr(stock, CACHE))


def test_deep_layers_hold_less_and_the_trace_says_how_much() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    length = given["input_ids"].shape[1]
    with foveate.prune(model, [FoPru(keep=0.5), PyramidDrop(layers=(1, 3), keep=(0.25, 5))]) as trace:
        out = generate(model, given, max_new_tokens=1)
        lengths = [shape[2] for shape in sizes(getattr(out, CACHE))]
        text = 8  # of the longest row, which has two pictures
        assert lengths == [text + 36, text + 18, text + 18, text + 10] and length == text + 72
        assert list(trace.kv_lengths) == lengths and trace.kv_bytes == held_by(getattr(out, CACHE))
        assert trace.budget.tokens == (18.0, 9.0, 9.0, 5.0)
        assert [stage.layer for stage in trace.images[0].stages] == [None, 1, 3]
        out = generate(model, given, max_new_tokens=1, num_beams=3)
        assert trace.kv_bytes == held_by(getattr(out, CACHE))


@each_decoder("llama", "mistral, wide window")
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "fopru+fastv", "ragged", "ragged+pyramiddrop"])
def test_the_trace_counts_what_the_tensors_hold(name: str, decoder: str) -> None:
    model = made(decoder)
    with foveate.prune(model, METHODS[name]) as trace:
        out = generate(model, tiny.inputs(model, *ROWS), max_new_tokens=1)
        assert list(trace.kv_lengths) == [shape[2] for shape in sizes(getattr(out, CACHE))]
        assert trace.kv_bytes == held_by(getattr(out, CACHE))
        model(**tiny.inputs(model, *ROWS))
        assert trace.kv_bytes == held_by(getattr(out, CACHE))


# ---------------------------------------------------------------------------------------------------------------------
# forward()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MAIN)
def test_short_logits_and_the_loss_of_a_direct_call_keep_their_places(name: str, padding: str) -> None:
    model = tiny.model(decoder="qwen2")
    given = tiny.inputs(model, *ROWS, padding=padding)
    ids, mask = given["input_ids"], given["attention_mask"].bool()
    labels = ids.masked_fill(~mask | (ids == tiny.IMAGE), -100)
    labels[torch.arange(3), mask.int().argmax(dim=1)] = -100  # nothing but padding comes before it
    with torch.no_grad(), foveate.prune(model, METHODS[name], short_outputs=True) as trace:
        out = model(**given, labels=labels)
        without_cache = model(**given, labels=labels, use_cache=False)
        last = model(**given, logits_to_keep=1).logits
        call = trace.latest
    torch.testing.assert_close(out.loss, without_cache.loss)
    # One row through the output head may be rounded in another way than many.
    torch.testing.assert_close(last, out.logits[:, -1:], atol=1e-5, rtol=1e-5)
    assert out.logits.shape[1] == call.index.shape[1], "of what entered the decoder, nothing is missing"
    total, count = 0.0, 0
    for row in range(3):
        _, talk = logits_of([Turn(given, torch.zeros(3, 1).long(), call)], model, METHODS[name], row)
        came = call.index[row] >= 0
        got, stays = out.logits[row, came], talk.alive[-1]
        torch.testing.assert_close(got[stays], talk.logits[stays], atol=1e-4, rtol=0)
        speaks = torch.arange(stays.numel()).where(stays, -1).cummax(dim=0).values  # in the place of what has left
        torch.testing.assert_close(got, talk.logits[speaks], atol=1e-4, rtol=0)
        wanted = labels[row, call.index[row][came]][stays]
        losses = torch.nn.functional.cross_entropy(talk.logits[stays][:-1], wanted[1:], reduction="sum")
        total, count = total + float(losses), count + int((wanted[1:] != -100).sum())
    assert float(out.loss) == pytest.approx(total / count, abs=1e-4)


def test_a_prompt_that_ends_in_dropped_tokens_goes_on_from_the_last_that_stayed() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "5i")
    methods: list[Method] = [Fixed(kept=(3, 20))]
    with foveate.prune(model, methods):
        out = generate(model, given)
        direct = model(**given).logits[0, -1]
    turn = Turn(given, out.sequences[:, -STEPS:], None)
    assert worst(out, rows_of([turn], model, methods)) < 1e-4
    torch.testing.assert_close(direct, out.logits[0][0], atol=1e-5, rtol=0)


def test_a_loss_reaches_the_projector_through_the_tokens_that_stay() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS, padding="right")
    labels = given["input_ids"].masked_fill(given["input_ids"] == tiny.IMAGE, -100)
    with foveate.prune(model, METHODS["fopru+fastv"]):
        model(**given, labels=labels, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.multi_modal_projector.parameters())
    model.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("fastv:layer=4", r"layer=4 is outside 1\.\.3 of a decoder of 4 blocks"),
        ("fastv:layer=9", r"layer=9 is outside 1\.\.3"),
        ("pyramiddrop:layers=1/2/4", r"layer=4 is outside 1\.\.3"),
        ("sparsevlm:layers=1/2/7", r"layer=7 is outside 1\.\.3"),
        ("fastv:layer=1,keep=0.25+fastv:layer=2,keep=0.5", r"18 tokens but 9 of .* 36 are left; the most is 9"),
        ("fopru:keep=4+fastv:layer=1,keep=5", r"5 tokens but 4 of .* the most is 4"),
        ("pyramiddrop:layers=1/2/3,keep=30/0.9/5", r"keep.*32 tokens but 30"),
        ("fastv:layer=1,keep=37", r"37 tokens but .*36"),
        ("h2o+snapkv:capacity=0.5", "two methods would evict from one cache"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_prune(methods: str, message: str) -> None:
    model = tiny.model()
    with untouched(model), pytest.raises(FoveateError, match=message):
        foveate.prune(model, methods)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastV(layer=0), "layer=0 is below 1"),
        (lambda: FastV(layer=True), "layer=True is no whole number"),
        (lambda: PyramidDrop(layers=(2, 1, 3)), "do not rise strictly; nearest: .1, 2, 3."),
        (lambda: PyramidDrop(layers=(1, 1, 2)), "do not rise strictly"),
        (lambda: PyramidDrop(layers=(1, 2, 3), keep=(0.25, 0.5, 0.1)), "rises from 0.25 to 0.5; the most is 0.25"),
        (lambda: SparseVLM(layers=(1, 2), keep=(5, 6)), "rises from 5 to 6; the most is 5"),
        (lambda: SparseVLM(layers=(1, 2), keep=(5, 4, 3)), "3 budgets .* for 2 layers"),
        (lambda: FastV(keep=0.0), "keep=0.0"),
        (lambda: FastV(keep=0), "keep=0"),
        (lambda: FastV(keep=float("nan")), "keep=nan"),
    ],
)
def test_what_cannot_work_is_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make()


@pytest.mark.parametrize("methods", ["fastv:layer=1", "h2o", "fopru+fastv:layer=1,keep=0.1"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk_size": 16}, "prefill_chunk_size feeds .* in pieces"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens feeds"),
        ({"assistant_model": "self"}, "assistant_model feeds"),
        ({"use_cache": False}, "use_cache=False leaves it no place"),
        ({"cache_implementation": "quantized"}, "'quantized' cannot hold a pruned prompt"),
    ],
)
def test_what_feeds_the_prompt_in_pieces_is_refused(methods: str, options: dict[str, Any], message: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    options = {name: tiny.model(seed=1) if value == "self" else value for name, value in options.items()}
    reached = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: reached.append(1))
    with untouched(model), foveate.prune(model, methods) as trace:
        with pytest.raises(FoveateError, match=message):
            generate(model, given, **options)
        assert not reached and len(trace.history) == 0, "refused before work starts"
        generate(model, given, max_new_tokens=1)
    hook.remove()


def test_settings_of_the_model_itself_are_refused_as_well() -> None:
    model = tiny.model()
    model.generation_config.prefill_chunk_size = 16
    with foveate.prune(model, "fastv:layer=1"), pytest.raises(FoveateError, match="prefill_chunk_size"):
        generate(model, tiny.inputs(model, "3i4"))


def test_a_question_before_the_picture_is_refused_by_what_reads_it() -> None:
    model = tiny.model()
    method, message = "sparsevlm:layers=1/2,keep=0.5/0.2", "image 1 is followed by none"
    with foveate.prune(model, method), pytest.raises(FoveateError, match=message):
        generate(model, tiny.inputs(model, "3i4", "3i"))
