"""The cache of a pruned prompt: later turns, cuts, new orders, its record in the trace, and caches that are refused."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
from models import tiny
from models.doubles import Fixed, Ragged
from references import agreement, reference
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import Cache

import foveate
from foveate import FoveateError, Random
from foveate.runtime.seams import CACHE

ROWS = ("3i4", "2i1i5", "6", "1i")
STEPS = 4


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    settings = dict(max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
    return model.generate(**given, **{**settings, **options})


def say_more(given: dict[str, Tensor], out: Any, words: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Ids and mask of a whole conversation: prompt, answer and new words (B, T), of which `mask` may hide some."""
    answered = torch.ones_like(out.sequences[:, given["input_ids"].shape[1] :])
    mask = torch.ones_like(words) if mask is None else mask
    return {
        "input_ids": torch.cat([out.sequences, words], dim=1),
        "attention_mask": torch.cat([given["attention_mask"], answered, mask], dim=1),
    }


def new_part(whole: dict[str, Tensor], reached: int) -> dict[str, Tensor]:
    """The same turn with the ids that the cache does not hold yet, and the mask of everything."""
    return {"input_ids": whole["input_ids"][:, reached:], "attention_mask": whole["attention_mask"]}


# -- later turns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["all", "new"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("decoder", ["llama", "qwen2-mixed"])
def test_a_second_turn_of_text(decoder: str, cache: str, ids: str) -> None:
    model = tiny.model(decoder=decoder)
    first = tiny.inputs(model, *ROWS)
    text = model.config.get_text_config()
    held: Any = DynamicCache(config=text) if cache == "dynamic" else StaticCache(config=text, max_cache_len=150)
    words = torch.tensor([[5, 6, 7, 8]]).repeat(4, 1)
    hidden = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])  # left-padded as a tokenizer does
    if decoder != "llama":
        hidden = torch.ones_like(hidden)  # stock windows count padding in the middle
    with foveate.prune(model, Ragged()) as trace:
        out = generate(model, first, **{CACHE: held})
        whole = say_more(first, out, words, hidden)
        reached = whole["input_ids"].shape[1] - 5  # the last token of an answer is not in the cache
        again = generate(model, whole if ids == "all" else new_part(whole, reached), **{CACHE: held})
    assert again.sequences.shape[1] == (reached + 5 if ids == "all" else 5) + STEPS
    assert len(trace.history) == 1, "a turn of text is no prefill with an image"
    rows = agreement.prompts(model, {**whole, "pixel_values": first["pixel_values"]}, trace.latest)
    assert agreement.worst(model, rows, again, STEPS) < agreement.TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_an_answer_that_ended_early_is_hidden_in_the_next_turn(cache: str) -> None:
    """What pads a finished row is in the cache; the caller's mask keeps the next turn from reading it."""
    model = tiny.model()
    first = tiny.inputs(model, "3i4", "2i1i5")
    text = model.config.get_text_config()
    held: Any = DynamicCache(config=text) if cache == "dynamic" else StaticCache(config=text, max_cache_len=150)
    with foveate.prune(model, Ragged()) as trace:
        out = generate(model, first, **{CACHE: held})
        whole = say_more(first, out, torch.tensor([[5, 6, 7]] * 2))
        end = first["input_ids"].shape[1] + 2
        whole["attention_mask"][0, end : end + 2] = 0
        again = generate(model, whole, **{CACHE: held})
    rows = agreement.prompts(model, {**whole, "pixel_values": first["pixel_values"]}, trace.latest)
    assert [prompt.next_position for prompt in rows] == [7 + 36 + 5, 8 + 72 + 7]
    assert agreement.worst(model, rows, again, STEPS) < agreement.TOLERANCE


@pytest.mark.parametrize("ids", ["all", "new"])
@pytest.mark.parametrize("decoder", ["llama", "mistral-sliding"])
def test_three_turns_with_a_picture_each(decoder: str, ids: str) -> None:
    model = tiny.model(decoder=decoder)
    turns = [tiny.inputs(model, row, seed=seed) for seed, row in enumerate(["3i4", "2i", "i5"])]
    said, cache = torch.empty(1, 0, dtype=torch.int64), None
    with foveate.prune(model, Fixed((0, 3, 17))) as trace:
        for turn in turns:
            reached = max(0, said.shape[1] - 1)
            whole = torch.cat([said, turn["input_ids"]], dim=1)
            given = {
                "input_ids": whole if ids == "all" else whole[:, reached:],
                "attention_mask": torch.ones_like(whole),
                "pixel_values": turn["pixel_values"],
            }
            out = generate(model, given, **{CACHE: cache})
            said, cache = torch.cat([whole, out.sequences[:, -STEPS:]], dim=1), getattr(out, CACHE)
    pictures = torch.cat([turn["pixel_values"] for turn in turns])
    given = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "pixel_values": pictures}
    rows = agreement.prompts(model, given, *trace.history)
    assert agreement.worst(model, rows, out, STEPS) < agreement.TOLERANCE
    last = trace.index[0]
    kept, words = turns[2]["input_ids"][0, trace.images[0].kept], turns[2]["input_ids"][0, tiny.TOKENS :]
    assert torch.equal(whole[0, last], torch.cat([whole[0, reached : reached + 1], kept, words]))


def test_a_turn_after_several_samples_of_each_row() -> None:
    """The cache of a call with two answers per row goes on with as many rows."""
    model = tiny.model()
    first = tiny.inputs(model, "3i4", "2i1i5")
    with foveate.prune(model, Ragged()) as trace:
        torch.manual_seed(3)
        out = generate(model, first, do_sample=True, num_return_sequences=2)
        doubled = {**first, "attention_mask": first["attention_mask"].repeat_interleave(2, dim=0)}
        whole = say_more(doubled, out, torch.tensor([[5, 6, 7]] * 4))
        again = generate(model, whole, **{CACHE: getattr(out, CACHE)})
    # Row 0 has picture 0, row 1 the pictures 1 and 2; twice each.
    owners, pictures = [0, 1, 2, 2, 3, 3], [0, 0, 1, 2, 1, 2]
    images = [
        dataclasses.replace(trace.images[picture], row=row) for row, picture in zip(owners, pictures, strict=True)
    ]
    call = dataclasses.replace(trace.latest, images=tuple(images))
    rows = agreement.prompts(model, {**whole, "pixel_values": first["pixel_values"][pictures]}, call)
    assert agreement.worst(model, rows, again, STEPS) < agreement.TOLERANCE


def test_a_pruned_cache_of_other_rows_is_refused() -> None:
    model = tiny.model()
    first = tiny.inputs(model, "3i4", "2i1i5")
    with foveate.prune(model, Random(keep=0.25)):
        out = generate(model, first)
        one = tiny.inputs(model, "3")
        with pytest.raises(FoveateError, match="the cache holds 2 rows, the prompt has 1"):
            model(input_ids=one["input_ids"], **{CACHE: getattr(out, CACHE)})


def test_a_prompt_without_new_tokens_is_refused() -> None:
    model = tiny.model()
    first = tiny.inputs(model, "3i4")
    with foveate.prune(model, Random(keep=0.25)):
        out = generate(model, first)
        message = "the cache holds 46 tokens already and the prompt brings no new one"
        with pytest.raises(FoveateError, match=message):
            generate(model, {"input_ids": first["input_ids"]}, **{CACHE: getattr(out, CACHE)})


# -- the caller's own operations --------------------------------------------------------------------------------------


@pytest.fixture
def answered() -> Any:
    """A handle at work, ragged rows, and the cache after four tokens of answer."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5", "6")
    handle = foveate.prune(model, Ragged()).start()
    with torch.no_grad():
        yield model, given, handle, generate(model, given, max_new_tokens=5)
    handle.stop()


def follow(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    """Logits of tokens (B, T) that follow a cache."""
    return model(input_ids=tokens, **{CACHE: cache}).logits


def expected_logits(model: Any, given: dict[str, Tensor], call: Any, answers: Tensor, order: list[int]) -> Tensor:
    rows = agreement.prompts(model, given, call)
    return torch.stack([reference.answer_logits(model, rows[row], a) for row, a in zip(order, answers, strict=True)])


def test_rows_that_are_repeated_selected_and_reordered(answered: Any) -> None:
    model, given, handle, out = answered
    call, cache, answers = handle.trace.latest, getattr(out, CACHE), out.sequences[:, -5:]
    cache.batch_repeat_interleave(2)
    order = [0, 0, 1, 1, 2, 2]
    cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
    order = order[::-1]
    cache.batch_select_indices(torch.tensor([1, 3, 4]))
    order = [order[1], order[3], order[4]]
    assert order == [2, 1, 0]
    answers = torch.stack([answers[row] for row in order])
    words = torch.tensor([[7, 8]] * 3)
    tokens = torch.cat([answers[:, -1:], words], dim=1)
    logits = follow(model, cache, tokens)
    expected = expected_logits(model, given, call, torch.cat([answers, words, words[:, :1]], dim=1), order)
    torch.testing.assert_close(logits, expected[:, -3:], atol=agreement.TOLERANCE, rtol=0)


@pytest.mark.parametrize("tokens", [1, 3, 4, 6, 8])
def test_a_cut_of_the_answer_and_of_the_text_after_the_image(tokens: int) -> None:
    """Four tokens of answer and four words after the image may be cut off."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "1i1i5")
    with torch.no_grad(), foveate.prune(model, Ragged()) as trace:
        out = generate(model, given, max_new_tokens=5)
        call = trace.latest
        cache = getattr(out, CACHE)
        cache.crop(-tokens)
        held = torch.cat([given["input_ids"], out.sequences[:, -5:-1]], dim=1)[:, :-tokens]
        words = torch.tensor([[7, 8, 9]] * 2)
        logits = follow(model, cache, words)
        assert int(cache.get_seq_length()) == call.length + 4 - tokens + 3
    whole = torch.cat([held, words], dim=1)
    mask = torch.cat([given["attention_mask"], torch.ones(2, 10, dtype=torch.int64)], dim=1)[:, : whole.shape[1]]
    whole_given = {"input_ids": whole, "attention_mask": mask, "pixel_values": given["pixel_values"]}
    for row, prompt in enumerate(agreement.prompts(model, whole_given, call)):
        expected = reference.decode(model, prompt, prompt.embeddings[:0])[0]
        torch.testing.assert_close(logits[row], expected[-3:], atol=agreement.TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("row", "kept", "tokens"),
    [("3i4", (0, 3, 17), 5), ("3i4", (33, 34, 35), 44), ("3i", (3, 20, 21), 1), ("3i", (0, 3, 17), 1)],
)
def test_a_cut_through_visual_tokens_is_refused(row: str, kept: tuple[int, ...], tokens: int) -> None:
    """Also where the last kept tokens are neighbours but the picture goes on behind them."""
    model = tiny.model()
    given = tiny.inputs(model, row)
    with foveate.prune(model, Fixed(kept)):
        cache = getattr(generate(model, given, max_new_tokens=1), CACHE)
        length = int(cache.get_seq_length())
        with pytest.raises(FoveateError, match=r"crop removes \d+ of the \d+ prompt entries and cuts through pruned"):
            cache.crop(-tokens)
        assert int(cache.get_seq_length()) == length, "nothing is cut by a refused call"


def test_reset_makes_the_cache_empty_and_free() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    handle = foveate.prune(model, Random(keep=0.25)).start()
    out = generate(model, given)
    cache = getattr(out, CACHE)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    again = generate(model, given, **{CACHE: cache})
    assert getattr(again, CACHE) is cache
    assert torch.equal(again.sequences, out.sequences)
    cache.reset()
    handle.stop()
    unpruned = generate(model, given)
    assert torch.equal(generate(model, given, **{CACHE: cache}).sequences, unpruned.sequences)


def test_a_reset_cache_that_was_filled_elsewhere_is_refused() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    handle = foveate.prune(model, Random(keep=0.25)).start()
    cache = getattr(generate(model, given), CACHE)
    handle.stop()
    cache.reset()
    generate(model, given, **{CACHE: cache})
    handle.start()
    with pytest.raises(FoveateError, match="holds 46 tokens of a prompt that was not pruned"):
        generate(model, given, **{CACHE: cache})
    handle.stop()


def test_a_copied_cache_goes_on_by_itself() -> None:
    """One prompt, several questions: its cache is copied for each of them."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    with torch.no_grad(), foveate.prune(model, Ragged()) as trace:
        prefix = DynamicCache(config=model.config.get_text_config())
        first = generate(model, given, **{CACHE: prefix}, max_new_tokens=1)
        for words in ([[5, 6]] * 2, [[7, 8]] * 2):
            whole = say_more(given, first, torch.tensor(words))
            mine = copy.deepcopy(prefix)
            out = generate(model, whole, **{CACHE: mine})
            rows = agreement.prompts(model, {**whole, "pixel_values": given["pixel_values"]}, trace.latest)
            assert agreement.worst(model, rows, out, STEPS) < agreement.TOLERANCE
        copied = copy.deepcopy(prefix)
        copied.crop(-1)
        copied.reset()
        assert int(prefix.get_seq_length()) == trace.length
    with pytest.raises(FoveateError, match="has been stopped"):
        mine.get_seq_length()


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    with foveate.prune(model, Ragged()):
        with torch.inference_mode():
            out = generate(model, given)
        whole = say_more(given, out, torch.tensor([[5, 6]] * 2))
        after = generate(model, {key: value.clone() for key, value in whole.items()}, **{CACHE: getattr(out, CACHE)})
        expected = generate(model, given)
        expected = generate(model, whole, **{CACHE: getattr(expected, CACHE)})
    assert torch.equal(after.sequences, expected.sequences)


# -- whose cache it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "bare", "static"])
def test_an_empty_cache_is_upgraded_in_place(kind: str) -> None:
    model = tiny.model()
    text = model.config.get_text_config()
    cache: Any = DynamicCache(config=text) if kind == "dynamic" else DynamicCache()
    if kind == "static":
        cache = StaticCache(config=text, max_cache_len=60)
    before = type(cache)
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, Random(keep=0.25)) as trace:
        plain = generate(model, given)
        out = generate(model, given, **{CACHE: cache})
    assert getattr(out, CACHE) is cache
    assert isinstance(cache, before)
    assert torch.equal(out.sequences, plain.sequences)
    assert int(cache.layers[0].get_seq_length()) == trace.length + STEPS - 1


def test_a_stopped_handles_cache_is_an_error_until_it_starts_again() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    handle = foveate.prune(model, Random(keep=0.25)).start()
    out = generate(model, given)
    whole = say_more(given, out, torch.tensor([[5, 6]]))
    expected = handle.trace.latest
    handle.stop()
    cache = getattr(out, CACHE)
    message = "this cache was pruned by a handle that has been stopped.*call handle.start\\(\\) again, or reset\\(\\)"
    for call in (
        lambda: generate(model, whole, **{CACHE: cache}),
        lambda: model(input_ids=torch.tensor([[7]]), **{CACHE: cache}),
        lambda: model.model(input_ids=torch.tensor([[7]]), **{CACHE: cache}),
        lambda: cache.get_seq_length(),
    ):
        with pytest.raises(FoveateError, match=message):
            call()
    other = foveate.prune(model, Random(keep=0.25)).start()
    with pytest.raises(FoveateError, match=message):
        generate(model, whole, **{CACHE: cache})
    other.stop()
    handle.start()
    again = generate(model, whole, **{CACHE: cache})
    handle.stop()
    rows = agreement.prompts(model, {**whole, "pixel_values": given["pixel_values"]}, expected)
    assert agreement.worst(model, rows, again, STEPS) < agreement.TOLERANCE


def test_another_handles_cache_is_refused() -> None:
    mine, other = tiny.model(), tiny.model()
    given = tiny.inputs(mine, "3i4")
    with foveate.prune(mine, Random(keep=0.25)), foveate.prune(other, Random(keep=0.25)):
        cache = getattr(generate(other, given), CACHE)
        with pytest.raises(
            FoveateError, match="this cache was pruned by another handle; give each handle a cache of its"
        ):
            generate(mine, given, **{CACHE: cache})
        with pytest.raises(FoveateError, match="pruned by another handle"), torch.no_grad():
            mine(**given, **{CACHE: cache})


class _Foreign(Cache):
    """A cache of somebody else's."""


def refused_caches(model: Any, given: dict[str, Tensor]) -> dict[str, tuple[Any, str]]:
    """Caches that pruning cannot work with, and what is said of them."""
    text = model.config.get_text_config()
    filled = DynamicCache(config=text)
    model.generate(**given, **{CACHE: filled}, max_new_tokens=1)
    offloaded = DynamicCache(config=text)
    offloaded.offloading = True  # asked for by argument, it opens a stream on a device that may not be there
    empty = "use an empty DynamicCache or StaticCache, or none"
    return {
        "filled": (filled, "this DynamicCache holds 43 tokens of a prompt that was not pruned; start with an empty"),
        "offloaded": (offloaded, "an offloaded DynamicCache cannot hold a pruned"),
        "foreign": (_Foreign(layers=[]), f"_Foreign cannot hold a pruned prompt; {empty}"),
        "encoder-decoder": (
            EncoderDecoderCache(DynamicCache(), DynamicCache()),
            f"EncoderDecoderCache cannot hold a pruned prompt; {empty}",
        ),
        "tuple": (((torch.zeros(1), torch.zeros(1)),), f"tuple cannot hold a pruned prompt; {empty}"),
    }


@pytest.mark.parametrize("kind", ["filled", "offloaded", "foreign", "encoder-decoder", "tuple"])
def test_caches_that_cannot_be_pruned_are_refused(kind: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    cache, message = refused_caches(model, given)[kind]
    encoded = []
    model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    with foveate.prune(model, Random(keep=0.25)), torch.no_grad():
        with pytest.raises(FoveateError, match=re.escape(message)):
            model.generate(**given, **{CACHE: cache}, max_new_tokens=1)
        with pytest.raises(FoveateError, match=re.escape(message)):
            model(**given, **{CACHE: cache})
    assert not encoded, "refused before any work"


def test_a_quantized_cache_is_refused() -> None:
    from transformers.cache_utils import QuantizedCache

    cache = object.__new__(QuantizedCache)  # its backends are not installed
    model = tiny.model()
    message = "QuantizedCache cannot hold a pruned prompt; use an empty DynamicCache"
    with foveate.prune(model, Random(keep=0.25)), pytest.raises(FoveateError, match=message):
        model.generate(**tiny.inputs(model, "3i4"), **{CACHE: cache}, max_new_tokens=1)


# -- what the trace says of it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", tiny.DECODERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_lengths_and_bytes_are_those_of_the_cache(decoder: str, options: dict[str, Any]) -> None:
    model = tiny.model(decoder=decoder)
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, Ragged()) as trace:
        cache = getattr(generate(model, given, max_new_tokens=1, **options), CACHE)
    assert trace.kv_lengths == tuple(layer.keys.shape[2] for layer in cache.layers)
    held = sum(one.numel() * one.element_size() for layer in cache.layers for one in (layer.keys, layer.values))
    assert trace.kv_bytes == trace.budget.kv_bytes == held
    unpruned = getattr(generate(model, given, max_new_tokens=1, **options), CACHE)
    held = sum(one.numel() * one.element_size() for layer in unpruned.layers for one in (layer.keys, layer.values))
    assert trace.unpruned.kv_bytes == held


def test_lengths_and_bytes_of_a_second_turn() -> None:
    model = tiny.model()
    first, second = tiny.inputs(model, "3i4", "2i1i5"), tiny.inputs(model, "i3", "5", seed=1)
    with foveate.prune(model, Ragged()) as trace:
        out = generate(model, first)
        whole = say_more(first, out, second["input_ids"], second["attention_mask"])
        cache = getattr(
            generate(
                model,
                {**whole, "pixel_values": second["pixel_values"]},
                **{CACHE: getattr(out, CACHE)},
                max_new_tokens=1,
            ),
            CACHE,
        )
    assert trace.kv_lengths == tuple(layer.keys.shape[2] for layer in cache.layers)
    assert trace.kv_bytes == sum(one.numel() * 4 for layer in cache.layers for one in (layer.keys, layer.values))


def test_bytes_of_half_precision() -> None:
    model = tiny.model().to(torch.bfloat16)
    given = tiny.inputs(model, "3i4")
    given["pixel_values"] = given["pixel_values"].to(torch.bfloat16)
    with foveate.prune(model, "fopru:keep=0.25") as trace:
        cache = getattr(generate(model, given, max_new_tokens=1), CACHE)
    assert trace.kv_bytes == sum(one.numel() * 2 for layer in cache.layers for one in (layer.keys, layer.values))
