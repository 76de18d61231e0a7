"""What generate() calls back sees the caller's prompt: exactly what it sees without pruning.

The head's logits are drawn beforehand, so that an answer depends on callbacks and settings alone: the stock model's
answer is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from models.steady import steady
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

import foveate
from foveate.runtime.seams import CACHE

ROWS = ("3i4", "2i1i5", "6")
STEPS = 6
# Before the encoder's end, behind the encoder, inside the decoder, on the cache.
METHODS = ("tome:keep=9", "fopru:keep=0.25", "fastv:layer=1,keep=0.25", "h2o:heavy=0.2,recent=0.2")
each_method = pytest.mark.parametrize("method", METHODS)


class Notes:
    """Ids that somebody was shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Look(LogitsProcessor, Notes):
    """Bans every word of the prompt, counted from its length, and the latest one of the answer."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.clone())
        banned = torch.cat([input_ids[:, : self.length], input_ids[:, self.length :][:, -1:]], dim=1)
        return scores.scatter(1, banned, -1000.0)


class StopAfter(StoppingCriteria, Notes):
    """Ends a row when its answer has as many words as its number and two more."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        self.seen.append(input_ids.clone())
        rows = torch.arange(input_ids.shape[0])
        return input_ids.shape[1] - self.length >= rows.clamp(max=3) + 2


def answer(model: Any, given: dict[str, Tensor], method: str | None, end: bool = False, **options: Any) -> Tensor:
    settings: dict[str, Any] = {"max_new_tokens": STEPS, **options}
    with steady(model, end):
        if method is None:
            return model.generate(**given, **settings)
        with foveate.prune(model, method):
            return model.generate(**given, **settings)


def both(method: str, rows: tuple[str, ...], options: Callable[[dict[str, Tensor], Any], dict[str, Any]]) -> Tensor:
    """The answer, which must be the stock model's; `options` makes new ones for each of the two."""
    model = tiny.model()
    model.generation_config.eos_token_id = tiny.EOS
    given = tiny.inputs(model, *rows)
    expected = answer(model, given, None, **options(given, model))
    got = answer(model, given, method, **options(given, model))
    assert torch.equal(got, expected)
    return got


@each_method
@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2},
                                   {"do_sample": True, "num_return_sequences": 2, "top_k": 0}])  # fmt: skip
def test_processors_criteria_and_prefixes_see_the_callers_ids(method: str, beams: dict[str, Any]) -> None:
    noted: list[list[Tensor]] = []

    def options(given: dict[str, Tensor], model: Any) -> dict[str, Any]:
        torch.manual_seed(3)
        length = given["input_ids"].shape[1]
        look, stop = Look(length), StopAfter(length)
        prefixes: list[Tensor] = []
        noted.append(look.seen)
        noted.append(stop.seen)
        noted.append(prefixes)

        def allowed(row: int, ids: Tensor) -> list[int]:
            prefixes.append(ids.clone())
            said = ids[length:].tolist()
            return [word for word in range(2, tiny.IMAGE) if (word + len(said) + row) % 3]

        return {
            "logits_processor": LogitsProcessorList([look]),
            "stopping_criteria": StoppingCriteriaList([stop]),
            "prefix_allowed_tokens_fn": allowed,
            **beams,
        }

    both(method, ROWS, options)
    assert all(noted), "each of them was asked"
    for expected, got in zip(noted[:3], noted[3:], strict=True):
        assert len(got) == len(expected)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


SETTINGS: dict[str, dict[str, Any]] = {
    "min_length": {"min_length": 86, "end": True},
    "min_new_tokens": {"min_new_tokens": 4, "end": True},
    "max_length": {"max_length": 84, "max_new_tokens": None},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 0.2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[7], [8, 9], *([word] for word in range(20, 60))]},
    "sequence_bias": {"sequence_bias": [[[word], 9.0 - word / 10] for word in range(20, 60)]},
    "forced_eos_token_id": {"forced_eos_token_id": tiny.EOS},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 4.0)},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(20, 90))},
    "top_k": {"do_sample": True, "top_k": 7},
}


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_read_the_ids_act_as_without_pruning(name: str, method: str) -> None:
    def options(given: dict[str, Tensor], model: Any) -> dict[str, Any]:
        torch.manual_seed(5)
        return SETTINGS[name]

    got = both(method, ROWS, options)
    plain = both(method, ROWS, lambda given, model: {"end": SETTINGS[name].get("end", False)})
    assert got.shape != plain.shape or not torch.equal(got, plain), "the setting changes something"


@pytest.mark.parametrize("padding", ["left", "none"])
def test_a_penalty_on_repetition_leaves_out_the_callers_padding(padding: str) -> None:
    rows = ROWS if padding == "left" else ("3i4",)
    both("fopru:keep=0.25", rows, lambda given, model: {"repetition_penalty": 5.0, "num_beams": 2})


def words() -> PreTrainedTokenizerFast:
    """The tiny models' words, and one that stop strings are tried with."""
    known = {"<pad>": tiny.PAD, "</s>": tiny.EOS, "abcdef": 2, **{f"w{word}": word for word in range(3, tiny.IMAGE)}}
    made = Tokenizer(models.WordLevel(known, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@each_method
@pytest.mark.parametrize("first", ["prompt", "answer"])
def test_stop_strings(first: str, method: str) -> None:
    """Also one that begins in the prompt, of which an answer of one word is the end."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    said = answer(model, given, None)[0].tolist()
    place = given["input_ids"].shape[1] + (0 if first == "prompt" else 2)
    text = f"w{said[place - 1]} w{said[place]}"
    stopped = both(method, ("3i4",), lambda given, model: {"stop_strings": [text], "tokenizer": words()})
    assert stopped.shape[1] == place + 1


def test_a_longest_length_of_the_callers_own() -> None:
    def options(given: dict[str, Tensor], model: Any) -> dict[str, Any]:
        length = given["input_ids"].shape[1]
        return {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(length + 3)])}

    got = both("fopru:keep=0.25", ROWS, options)
    assert got.shape[1] == tiny.inputs(tiny.model(), *ROWS)["input_ids"].shape[1] + 3


def test_a_processor_that_generate_knows_may_be_the_callers() -> None:
    def options(given: dict[str, Tensor], model: Any) -> dict[str, Any]:
        return {"logits_processor": [RepetitionPenaltyLogitsProcessor(4.0)], "repetition_penalty": 1.1}

    both("fopru:keep=0.25", ("3i4",), options)


def test_a_processor_that_wants_more_than_there_is_fails_as_without_pruning() -> None:
    class Wants(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor, more: Tensor) -> Tensor:
            raise AssertionError("never called")

    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    for method in (None, "fopru:keep=0.25"):
        with pytest.raises(ValueError, match=r"all the required parameters: .*more.* are passed"):
            answer(model, given, method, logits_processor=LogitsProcessorList([Wants()]))


def test_criteria_that_end_an_answer_end_rows_alone() -> None:
    """What generate() asks of a criterion beside calling it: whether it knows the token that ends an answer."""

    class Ends(StoppingCriteria):
        eos_token_id = torch.tensor([tiny.EOS])

        def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
            return input_ids[:, -1] % 3 == 0

    model = tiny.model()  # without an end of its own
    given = tiny.inputs(model, *ROWS)
    expected = answer(model, given, None, stopping_criteria=[Ends()])
    assert (expected == tiny.PAD).any()
    assert torch.equal(answer(model, given, "fopru:keep=0.25", stopping_criteria=[Ends()]), expected)


def test_the_callers_lists_stay_as_they_are() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    look, stop = Look(43), StopAfter(43)
    processors, criteria = LogitsProcessorList([look]), StoppingCriteriaList([stop])
    answer(model, given, "fopru:keep=0.25", logits_processor=processors, stopping_criteria=criteria)
    assert processors == [look]
    assert criteria == [stop]


def test_a_later_turn_shows_what_the_caller_gave() -> None:
    """Ids that repeat the conversation, and new ones alone."""
    model = tiny.model()
    first, then = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i3", seed=1)
    for repeat in (True, False):
        with foveate.prune(model, "fopru:keep=0.25"):
            out = model.generate(**first, max_new_tokens=3, return_dict_in_generate=True)
            cache = {CACHE: out[CACHE]}
            said = out.sequences
            mask = torch.ones(1, said.shape[1] + then["input_ids"].shape[1], dtype=torch.int64)
            ids = torch.cat([said, then["input_ids"]], dim=1) if repeat else then["input_ids"]
            look = Look(ids.shape[1])
            given = {"input_ids": ids, "attention_mask": mask, "pixel_values": then["pixel_values"]}
            out = model.generate(**given, **cache, max_new_tokens=3, logits_processor=[look])
        assert torch.equal(look.seen[-1], out[:, :-1])
        assert torch.equal(look.seen[0], ids)


@pytest.mark.parametrize("draft", ["prompt", "model"])
def test_drafts_are_judged_by_the_callers_ids(draft: str) -> None:
    """Also where a smaller model drafts, which is handed the processors as well."""
    model = tiny.model()
    given = tiny.inputs(model, "3i9")
    more: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if draft == "model":
        more = {"assistant_model": LlamaForCausalLM(model.config.get_text_config()).eval()}
        more["assistant_model"].generation_config.pad_token_id = tiny.PAD
    length = given["input_ids"].shape[1]
    with foveate.prune(model, "fopru:keep=0.25"):
        expected = model.generate(**given, max_new_tokens=8, logits_processor=[Look(length)])
        look = Look(length)
        out = model.generate(**given, max_new_tokens=8, logits_processor=[look], **more)
    assert torch.equal(out, expected)
    assert all(torch.equal(seen[:, :length], given["input_ids"]) for seen in look.seen)
