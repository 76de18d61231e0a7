"""What generate() gives back from a shortened prompt: the caller's lengths, sequences and streams."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from models import tiny
from models.conversations import STEPS
from torch import Tensor
from transformers import (
    GenerationConfig,
)
from transformers.generation.streamers import BaseStreamer, TextStreamer

import foveate
from foveate import FoPru, FoveateError, Random

# -- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_max_length_counts_the_prompt_that_the_caller_knows(keep: float) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    longest = given["input_ids"].shape[1]
    stored = GenerationConfig(max_length=longest + 5, pad_token_id=tiny.PAD)
    for options in ({"max_length": longest + 5}, {"generation_config": stored}, {"max_new_tokens": 5}):
        unpruned = model.generate(**given, **options)
        with foveate.prune(model, Random(keep=keep)):
            pruned = model.generate(**given, **options)
        assert pruned.shape == unpruned.shape == (2, longest + 5)


@pytest.mark.parametrize("longest", [1, 20, 43])
def test_a_max_length_that_leaves_no_room_is_refused_in_the_callers_numbers(longest: int) -> None:
    model = tiny.model()
    message = (
        f"max_length={longest} leaves no room for an answer to a prompt of 43 tokens; the smallest is max_length=44"
    )
    with foveate.prune(model, Random(keep=0.25)):
        with pytest.raises(FoveateError, match=message):
            model.generate(**tiny.inputs(model, "3i4"), max_length=longest)
        assert model.generate(**tiny.inputs(model, "3i4"), max_length=44).shape == (1, 44)


def test_max_length_in_the_models_own_generation_config() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    model.generation_config.max_length = 50
    with foveate.prune(model, Random(keep=0.25)):
        assert model.generate(**given).shape == (1, 50)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_the_default_length_is_twenty_new_tokens() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, Random(keep=0.25)):
        assert model.generate(**given).shape == (1, given["input_ids"].shape[1] + 20)


@pytest.mark.parametrize("option", ["min_length", "min_new_tokens"])
def test_the_shortest_answer_is_as_long_as_unpruned(option: str) -> None:
    """min_length counts the caller's prompt; the end comes as soon as it is allowed."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    length = given["input_ids"].shape[1]
    model.generation_config.eos_token_id = tiny.EOS
    options: dict[str, Any] = {option: 6 + (length if option == "min_length" else 0), "max_new_tokens": 12}
    model.lm_head.register_forward_hook(_prefer_end)
    unpruned = model.generate(**given, **options)
    with foveate.prune(model, Random(keep=0.25)):
        pruned = model.generate(**given, **options)
    assert pruned.shape == unpruned.shape == (1, length + 7)
    assert pruned[0, -1] == tiny.EOS


def _prefer_end(module: Any, given: Any, logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., tiny.EOS] = 100.0
    return logits


def test_rows_that_end_early_are_padded() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i9")
    with foveate.prune(model, Random(keep=0.25)):
        free = model.generate(**given, max_new_tokens=STEPS)
        end = int(free[0, -STEPS + 2])
        assert end not in free[1, -STEPS:].tolist(), "the second row must go on for this test to say something"
        out = model.generate(**given, max_new_tokens=STEPS, eos_token_id=end)
    where = free[0, -STEPS:].tolist().index(end)
    assert out[0, -STEPS:].tolist() == free[0, -STEPS:].tolist()[: where + 1] + [tiny.PAD] * (STEPS - where - 1)
    assert torch.equal(out[1], free[1])


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
@pytest.mark.parametrize("as_dict", [True, False])
def test_sequences_begin_with_the_callers_prompt(options: dict[str, Any], as_dict: bool) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    with foveate.prune(model, Random(keep=0.25)):
        out = model.generate(**given, max_new_tokens=3, return_dict_in_generate=as_dict, **options)
    sequences = out.sequences if as_dict else out
    times = sequences.shape[0] // 2
    prompt = given["input_ids"].repeat_interleave(times, dim=0)
    assert times == options.get("num_return_sequences", 1)
    assert torch.equal(sequences[:, :-3], prompt)


def test_ids_may_be_given_by_position() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    ids = given.pop("input_ids")
    with foveate.prune(model, Random(keep=0.25)):
        by_position = model.generate(ids, **given, max_new_tokens=3)
        by_old_name = model.generate(inputs=ids, **given, max_new_tokens=3)
        by_name = model.generate(input_ids=ids, **given, max_new_tokens=3)
    assert torch.equal(by_position, by_name)
    assert torch.equal(by_old_name, by_name)


def test_the_signature_is_that_of_the_stock_method() -> None:
    model = tiny.model()
    stock = inspect.signature(model.generate)
    with foveate.prune(model, Random(keep=0.25)):
        assert inspect.signature(model.generate) == stock
        assert model.generate.__name__ == "generate"


class _Notes(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_callers_prompt_and_then_each_token() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    streamer = _Notes()
    with foveate.prune(model, Random(keep=0.25)):
        out = model.generate(**given, max_new_tokens=5, streamer=streamer)
    assert torch.equal(streamer.values[0], given["input_ids"])
    assert torch.equal(torch.cat(streamer.values[1:]), out[0, -5:])
    assert len(streamer.values) == 6
    assert streamer.ended == 1


def test_a_text_streamer_skips_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    tokenizer = tiny.tokenizer()
    with foveate.prune(model, Random(keep=0.25)):
        out = model.generate(**given, max_new_tokens=5, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(out[0, -5:]).split()


def test_the_image_text_to_text_pipeline_runs_inside_the_handle() -> None:
    from PIL import Image
    from transformers import ImageTextToTextPipeline

    model = tiny.model()
    processor = tiny.processor(model)
    pipeline = ImageTextToTextPipeline(model=model, processor=processor)
    picture = Image.effect_mandelbrot((30, 40), (-2, -1, 1, 1), 50).convert("RGB")
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "w5 w6 w7"}]}]
    given = processor(images=[picture], text="w3 <image> w5 w6 w7 w4", return_tensors="pt")
    with foveate.prune(model, FoPru(keep=0.25)) as trace:
        answer = pipeline(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
        assert [image.after for image in trace.images] == [9]
        tokens = model.generate(**given, max_new_tokens=4)[0, -4:]
    assert answer.split() == processor.tokenizer.decode(tokens).split()
    assert len(answer.split()) == 4
