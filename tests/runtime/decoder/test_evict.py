"""Eviction from the KV cache against a decoder that caches nothing and hides what was evicted behind masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import tiny
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
from models.doubles import Ragged
from models.untouched import untouched
from transformers import DynamicCache, StaticCache

import foveate
from foveate import H2O, FastV, FoPru, ImageTextInteraction, PyramidDrop, SnapKV
from foveate.core import CacheSelection, FoveateError, Grid, Method, Signals, Site
from foveate.runtime.seams import CACHE

METHODS: dict[str, list[Method]] = {
    "h2o": [H2O(heavy=0.2, recent=0.1)],
    "h2o counts": [H2O(heavy=3, recent=2)],
    "h2o capped": [H2O(heavy=0.5, recent=0.5)],
    "snapkv": [SnapKV(capacity=0.3, window=4, kernel=3)],
    "snapkv count": [SnapKV(capacity=9, window=3, kernel=1)],
    "fopru+h2o": [FoPru(keep=0.5), H2O(heavy=0.2, recent=0.2)],
    "fastv+h2o": [FastV(layer=2, keep=0.25), H2O(heavy=0.3, recent=0.1)],
    "fastv+snapkv": [FastV(layer=1, keep=0.25), SnapKV(capacity=0.4, window=3, kernel=3)],
    "ragged+h2o": [Ragged(), H2O(heavy=0.3, recent=3)],
    "image and text": [ImageTextInteraction(where="output", heavy=0.3, recent=0.2)],
    "three sites": [FoPru(keep=0.5), PyramidDrop(layers=(1, 3), keep=(0.3, 0.1)), H2O(heavy=0.3, recent=0.2)],
    "ragged inside+snapkv": [RaggedInside(layer=2), SnapKV(capacity=0.4, window=2, kernel=3)],
}
MAIN = ("h2o", "snapkv", "fastv+h2o")
ALONE = ("h2o", "h2o capped", "snapkv", "fopru+h2o")  # no stage inside the decoder


@wide(
    {"llama": tuple(METHODS), "qwen3": MAIN, "mistral, wide window": MAIN, "mistral-sliding": MAIN[:1]},
    METHODS,
)
def test_a_padded_batch_equals_the_reference(name: str, decoder: str, attn: str) -> None:
    model = made(decoder, attn)
    given = tiny.inputs(model, *ROWS)
    out, turn = answered(model, given, METHODS[name])
    assert worst(out, rows_of([turn], model, METHODS[name])) < 1e-4
    if name != "h2o capped" and "sliding" not in decoder:
        without = [part for method in METHODS[name] for part in method.parts() if part.site != "cache"]
        assert worst(out, rows_of([turn], model, without)) > 0.01, "the reference must see what was evicted"


@wide({"llama": MAIN, "qwen2-mixed": MAIN[:1]}, MAIN)
def test_sampled_answers_equal_the_reference(name: str, decoder: str, attn: str) -> None:
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


@wide({"llama": (*ALONE, "fastv+h2o"), "qwen2-mixed": ("h2o",)}, (*ALONE, "fastv+h2o", "fastv+snapkv"))
def test_a_second_turn_of_text_equals_the_reference(name: str, decoder: str, attn: str) -> None:
    """New parts differ in length, so that the cache holds padding in its middle for a while."""
    model = made(decoder, attn)
    slides = "window" in decoder or decoder in {"mistral-sliding", "qwen2-mixed"}
    rows = ("4", "4", "4") if slides else ("7", "1", "3")
    first, then = tiny.inputs(model, *ROWS), tiny.inputs(model, *rows, seed=1)
    with untouched(model), foveate.prune(model, METHODS[name]) as trace:
        out = generate(model, first, max_new_tokens=3)
        turns = [Turn(first, out.sequences[:, -3:], trace.latest)]
        out = generate(model, continued(first, out.sequences, then), **{CACHE: getattr(out, CACHE)})
        turns.append(Turn(then, out.sequences[:, -STEPS:], None))
    assert worst(out, rows_of(turns, model, METHODS[name])) < 1e-4


@wide({"llama": ALONE}, ALONE)
def test_a_new_picture_in_a_second_turn_equals_the_reference(name: str, decoder: str, attn: str) -> None:
    model = made(decoder, attn)
    slides = "window" in decoder or decoder in {"mistral-sliding", "qwen2-mixed"}
    rows = ("1i3", "2i2", "3i1") if slides else ("5", "1i3", "2i1")
    first, then = tiny.inputs(model, *ROWS), tiny.inputs(model, *rows, seed=1)
    with untouched(model), foveate.prune(model, METHODS[name]) as trace:
        out = generate(model, first, max_new_tokens=3)
        turns = [Turn(first, out.sequences[:, -3:], trace.latest)]
        out = generate(model, continued(first, out.sequences, then), **{CACHE: getattr(out, CACHE)})
        turns.append(Turn(then, out.sequences[:, -STEPS:], trace.latest))
    assert worst(out, rows_of(turns, model, METHODS[name])) < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_row_in_a_batch_equals_the_row_alone(name: str) -> None:
    model = tiny.model(decoder="qwen3")
    given = tiny.inputs(model, "3i4", "2i1i5", "1i7")
    together, _ = answered(model, given, METHODS[name])
    for row in range(3):
        alone, _ = answered(model, tiny.alone(given, row, tiny.IMAGE), METHODS[name])
        difference = torch.stack(together.logits)[:, row] - torch.stack(alone.logits)[:, 0]
        assert difference.abs().max() < 2e-5


@pytest.mark.parametrize("attn", ATTENTION)
@each_decoder("llama", "mistral, wide window")
def test_a_cache_with_room_for_everything_is_identity(decoder: str, attn: str) -> None:
    model = made(decoder, attn)
    given = tiny.inputs(model, *ROWS)
    stock = generate(model, given)
    for method in (H2O(heavy=1.0, recent=1.0), H2O(heavy=500, recent=10), SnapKV(capacity=1.0, window=3)):
        out, _ = answered(model, given, [method])
        assert torch.equal(out.sequences, stock.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(stock.logits), atol=5e-6, rtol=0)


@each_decoder("llama", "mistral, wide window")
@pytest.mark.parametrize("name", METHODS)
def test_the_cache_holds_what_the_reference_holds(name: str, decoder: str) -> None:
    """The entries of every layer, row and KV head, and the bytes that the trace tells."""
    model = made(decoder)
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, METHODS[name]) as trace:
        out = generate(model, given, max_new_tokens=1)
        cache = getattr(out, CACHE)
        assert list(trace.kv_lengths) == [shape[2] for shape in sizes(cache)]
        assert trace.kv_bytes == held_by(cache)
        turn = Turn(given, out.sequences[:, -1:], trace.latest)
        repeated = generate(model, given, max_new_tokens=1, num_beams=2)
        assert trace.kv_bytes == held_by(getattr(repeated, CACHE)) == 2 * held_by(cache)
    for row in range(3):
        _, talk = logits_of([turn], model, METHODS[name], row)
        for number, layer in enumerate(cache.layers):
            counts = {len(held) for held in talk.entries(number)}
            assert len(counts) == 1
            timeline = cache.timeline.held[number]
            count = counts.pop()
            assert int(timeline.valid[row].sum()) == count
            first = int((trace.index[row] >= 0).int().argmax())  # of the row's own tokens, behind its padding
            ages = timeline.ages[row][:, timeline.valid[row]] - first
            assert ages.tolist() == talk.entries(number)
            assert layer.keys.shape[2] == timeline.valid.shape[1] == max(timeline.valid.sum(dim=1).tolist())


def test_budgets_cap_the_cache_while_decoding() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i8")
    prompt = 46
    for method, after in ((H2O(heavy=3, recent=2), 5), (H2O(heavy=0.5, recent=0.5), prompt),
                          (SnapKV(capacity=9, window=3), 9 + STEPS - 1)):  # fmt: skip
        with foveate.prune(model, method):
            cache = getattr(generate(model, given), CACHE)
            assert {shape[2] for shape in sizes(cache)} == {after}
            assert cache.get_seq_length() == prompt + STEPS - 1, "of the sequence, not of the tensors"


# ---------------------------------------------------------------------------------------------------------------------
# caches in the caller's hands


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_a_loop_by_hand_equals_the_reference(name: str, padding: str) -> None:
    model = tiny.model(decoder="qwen3")
    given = tiny.inputs(model, *ROWS, padding=padding)
    tokens = torch.randint(2, tiny.IMAGE, (3, 4), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), untouched(model), foveate.prune(model, METHODS[name]) as trace:
        out = model(**given)
        call, cache, mask = trace.latest, getattr(out, CACHE), given["attention_mask"]
        steps = []
        for token in tokens[:, :-1].T:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            steps.append(model(input_ids=token[:, None], attention_mask=mask, **{CACHE: cache}).logits[:, -1])
    for row, logits in enumerate(rows_of([Turn(given, tokens, call)], model, METHODS[name])):
        torch.testing.assert_close(torch.stack(steps)[:, row], logits[1:], atol=1e-4, rtol=0)


def test_rows_of_a_cache_are_selected_repeated_and_reordered() -> None:
    model = tiny.model()
    methods = METHODS["ragged+h2o"]
    given = tiny.inputs(model, *ROWS)
    tokens = torch.tensor([[5, 6], [7, 8], [9, 10]])
    changes: dict[tuple[int, ...], Any] = {
        (2, 0): lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
        (1, 2, 0): lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])),
    }
    found = []
    mask = torch.cat([given["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], dim=1)
    with torch.no_grad(), foveate.prune(model, methods) as trace:
        for order, change in changes.items():
            cache, rows = getattr(model(**given), CACHE), torch.tensor(order)
            change(cache)
            found.append(model(input_ids=tokens[rows, :1], attention_mask=mask[rows], **{CACHE: cache}).logits)
    expected = torch.stack(rows_of([Turn(given, tokens, trace.latest)], model, methods))[:, 1]
    for logits, order in zip(found, changes, strict=True):
        torch.testing.assert_close(logits[:, -1], expected[list(order)], atol=1e-4, rtol=0)


def test_an_evicted_cache_is_not_cropped_but_reset() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, METHODS["h2o"]):
        cache = DynamicCache(config=model.config.get_text_config())
        first = generate(model, given, **{CACHE: cache})
        with pytest.raises(FoveateError, match=r"evicted.*cannot be cropped; reset"):
            cache.crop(-1)
        cache.reset()
        again = generate(model, given, **{CACHE: cache})
    assert torch.equal(torch.stack(first.logits), torch.stack(again.logits))


@pytest.mark.parametrize("name", MAIN)
def test_a_cache_without_its_handle_is_refused(name: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, METHODS[name]):
        out = generate(model, given)
    longer = torch.cat([given["attention_mask"], torch.ones(3, STEPS + 1, dtype=torch.int64)], dim=1)
    ids = torch.cat([out.sequences, out.sequences[:, -1:]], dim=1)
    cache = getattr(out, CACHE)
    with pytest.raises(FoveateError, match="handle that has been stopped"):
        model(input_ids=ids[:, -1:], attention_mask=longer, **{CACHE: cache})
    with pytest.raises(FoveateError, match="handle that has been stopped"):
        model(input_ids=ids[:, -1:], **{CACHE: cache})
    with pytest.raises(FoveateError, match="handle that has been stopped"):
        model.generate(input_ids=ids, attention_mask=longer, **{CACHE: cache}, max_new_tokens=1)
    with foveate.prune(model, METHODS[name]), pytest.raises(FoveateError, match=r"stopped|another handle"):
        model.generate(input_ids=ids, attention_mask=longer, **{CACHE: cache}, max_new_tokens=1)


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def test_static_caches_are_refused() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with untouched(model), foveate.prune(model, METHODS["h2o"]) as trace:
        with pytest.raises(FoveateError, match="static cache cannot shrink; use a dynamic"):
            generate(model, given, cache_implementation="static")
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        with pytest.raises(FoveateError, match="static cache cannot shrink"):
            generate(model, given, **{CACHE: cache})
        with pytest.raises(FoveateError, match="static cache cannot shrink"):
            model(**given, **{CACHE: cache})
        with pytest.raises(FoveateError, match="use_cache=False leaves it no place"):
            model(**given, use_cache=False)
        generate(model, given, max_new_tokens=1)
    assert trace.kv_lengths


def test_a_new_picture_after_eviction_with_stages_is_refused() -> None:
    model = tiny.model()
    first, then = tiny.inputs(model, "3i4"), tiny.inputs(model, "1i2", seed=1)
    with untouched(model), foveate.prune(model, METHODS["fastv+h2o"]) as trace:
        out = generate(model, first, max_new_tokens=3)
        cache, calls = getattr(out, CACHE), len(trace.history)
        with pytest.raises(FoveateError, match=r"fastv:.*cannot follow a new image .* new cache"):
            generate(model, continued(first, out.sequences, then), **{CACHE: cache})
        assert len(trace.history) == calls, "a refused call is no call"
        text = tiny.inputs(model, "2", seed=1)
        again = generate(model, continued(first, out.sequences, text), **{CACHE: cache})
    turns = [
        Turn(first, out.sequences[:, -3:], trace.latest),
        Turn(text, again.sequences[:, -STEPS:], None),
    ]
    assert worst(again, rows_of(turns, model, METHODS["fastv+h2o"])) < 1e-4


@dataclass(frozen=True)
class Broken(Method):
    """Broken: keeps cache entries that are not there, or one of them twice."""

    site: ClassVar[Site] = "cache"
    needs = ("cache.age",)
    when: ClassVar[str] = "prefill"

    how: str = "twice"

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return ()

    def select(self, signals: Signals) -> Any:
        assert signals.cache is not None and signals.cache.age is not None
        age = signals.cache.age
        bad = {"twice": age[..., :1], "beyond": age[..., -1:] + 1, "before": age[..., :1] - 1}[self.how]
        return CacheSelection(torch.cat([age, bad], dim=-1))


@pytest.mark.parametrize("how", ["twice", "beyond", "before"])
def test_a_selection_of_entries_that_are_not_there_is_refused(how: str) -> None:
    model = tiny.model()
    message = "keeps a cache entry that is not there, or one twice"
    with untouched(model), foveate.prune(model, [Broken(how)]), pytest.raises(FoveateError, match=message):
        generate(model, tiny.inputs(model, "3i4"))
