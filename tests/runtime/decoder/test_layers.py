"""Pruning between decoder layers against a decoder that never forgets, caches or pads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import doubles, tiny
from models.conversations import (
    ATTENTION,
    ROWS,
    STEPS,
    RaggedInside,
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
from models.untouched import untouched
from torch import Tensor
from transformers import DynamicCache, StaticCache

import foveate
from foveate import FastV, FoPru, PyramidDrop, SparseVLM
from foveate.core import FoveateError, Method, Site
from foveate.runtime.seams import CACHE


@dataclass(frozen=True)
class Fixed(doubles.Fixed):
    """Fixed: keeps the indices it is told, after two blocks."""

    site: ClassVar[Site] = "layer"

    def depths(self, layers: int) -> tuple[int, ...]:
        return (2,)


METHODS: dict[str, list[Method]] = {
    "fastv": [FastV(layer=1, keep=0.25)],
    "pyramiddrop": [PyramidDrop(layers=(1, 2, 3), keep=(0.5, 0.25, 0.125))],
    "sparsevlm": [SparseVLM(layers=(1, 3), keep=(0.5, 0.2))],
    "sparsevlm recycling": [SparseVLM(layers=(1, 2), keep=(0.5, 0.25), recycle=True)],
    "fopru+fastv": [FoPru(keep=0.5), FastV(layer=2, keep=0.25)],
    "fastv+pyramiddrop": [FastV(layer=1, keep=0.6), PyramidDrop(layers=(2, 3), keep=(0.3, 0.2))],
    "ragged": [RaggedInside(layer=2)],
    "ragged+pyramiddrop": [doubles.Ragged(), PyramidDrop(layers=(1, 3), keep=(0.2, 0.1))],
    "ragged+sparsevlm": [doubles.Ragged(), SparseVLM(layers=(1, 2, 3), keep=(9, 4, 2))],
    "one depth": [FastV(layer=2, keep=0.5), FastV(layer=2, keep=0.2)],
    "one depth, two readers": [FastV(layer=2, keep=0.5), SparseVLM(layers=(2, 3), keep=(0.3, 0.2))],
}
MAIN = ("fastv", "pyramiddrop", "sparsevlm recycling", "fopru+fastv", "ragged")
SLIDING = ("mistral-sliding", "qwen2-mixed")


@wide(
    {"llama": tuple(METHODS), "mistral, wide window": MAIN, "qwen2-mixed": MAIN, "qwen3": MAIN[:1]}, METHODS, both=True
)
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


SECOND_TURNS = {"text only": ("5", "3", "4"), "a new picture": ("5", "1i3", "2i1")}


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


def test_a_static_cache_of_a_sliding_decoder_is_refused() -> None:
    model = tiny.model(decoder="mistral-sliding")
    message = r"slides.*use a dynamic cache"
    with untouched(model), foveate.prune(model, "fastv:layer=1"), pytest.raises(FoveateError, match=message):
        generate(model, tiny.inputs(model, "3i4"), cache_implementation="static")


def test_a_question_before_the_picture_is_refused_by_what_reads_it() -> None:
    model = tiny.model()
    method, message = "sparsevlm:layers=1/2,keep=0.5/0.2", "image 1 is followed by none"
    with foveate.prune(model, method), pytest.raises(FoveateError, match=message):
        generate(model, tiny.inputs(model, "3i4", "3i"))
