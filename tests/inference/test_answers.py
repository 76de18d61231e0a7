"""Greedy answers: the chat prompt, left padding, and where an answer ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny
from PIL import Image

from foveate.core import FoveateError
from foveate.inference.answers import answer, decode, encode, greedy, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture(scope="module")
def processor(model: Any) -> Any:
    return tiny.processor(model)


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.effect_noise((24, 24), spread).convert("RGB") for spread in (20, 60, 120)]


def test_the_prompt_holds_every_picture_before_the_question(processor: Any) -> None:
    assert prompt(processor, "w7 w8", images=2) == "w3 <image> <image> w7 w8 w4"


def test_prompts_are_padded_on_the_left(model: Any, processor: Any, pictures: list[Image.Image]) -> None:
    inputs = encode(model, processor, [[pictures[0]], [pictures[1]]], ["w7", "w7 w8 w9"])
    assert inputs["attention_mask"].tolist()[0] == [0, 0] + [1] * (tiny.TOKENS + 3)
    assert inputs["input_ids"][:, -1].tolist() == [4, 4]
    assert inputs["pixel_values"].shape == (2, 3, 24, 24)


def test_one_prompt_may_hold_several_pictures(model: Any, processor: Any, pictures: list[Image.Image]) -> None:
    inputs = encode(model, processor, [pictures[:2], pictures[2:]], ["w7", "w8"])
    assert (inputs["input_ids"] == tiny.IMAGE).sum(dim=1).tolist() == [2 * tiny.TOKENS, tiny.TOKENS]
    assert inputs["pixel_values"].shape[0] == 3


@pytest.mark.parametrize(
    ("bos", "template", "expected"),
    [("w5", "w5 <image> w6", 1), ("w5", "<image> w6", 1), (None, "<image> w6", 0)],
    ids=["the template writes it", "the tokenizer adds it", "the model has none"],
)
def test_the_token_that_starts_a_text_stands_once(
    model: Any, pictures: list[Image.Image], bos: str | None, template: str, expected: int
) -> None:
    from tokenizers.processors import TemplateProcessing

    processor = tiny.processor(model)
    if bos is not None:
        processor.tokenizer.bos_token = bos
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, 5)]
        )
    processor.chat_template = template
    inputs = encode(model, processor, [[pictures[0]]], ["w9"])
    assert int((inputs["input_ids"] == 5).sum()) == expected


def test_a_batch_answers_as_each_prompt_alone(model: Any, processor: Any, pictures: list[Image.Image]) -> None:
    questions = ["w7", "w8 w9 w10", "w11 w12"]
    together = answer(model, processor, pictures, questions, max_new_tokens=6)
    alone = [
        answer(model, processor, [picture], [question], max_new_tokens=6)[0]
        for picture, question in zip(pictures, questions, strict=True)
    ]
    assert together == alone
    assert all(len(text.split()) == 6 for text in together)


def test_greedy_overrules_what_the_checkpoint_samples_with(
    model: Any, processor: Any, pictures: list[Image.Image]
) -> None:
    sampling = tiny.model()
    sampling.generation_config.do_sample = True
    sampling.generation_config.temperature = 5.0
    inputs = encode(model, processor, [[pictures[0]]], ["w7"])
    assert torch.equal(greedy(sampling, inputs, max_new_tokens=8), greedy(model, inputs, max_new_tokens=8))


@pytest.mark.parametrize(
    ("ends", "expected"),
    [(1, ["w7", "w8 w9 w10"]), ([1, 9], ["w7", "w8"]), (None, ["w7 w8 w9", "w8 w9 w10"])],
)
def test_an_answer_stops_at_the_first_token_that_ends_it(processor: Any, ends: Any, expected: list[str]) -> None:
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
    output = torch.tensor([[50, 51, 7, 1, 8, 9], [50, 51, 8, 9, 10, 0]])  # two words of prompt, 1 ends, 0 pads
    assert decode(processor, model, output, prompt_length=2) == expected


def test_prompts_that_cannot_be_asked_are_refused(model: Any, processor: Any, pictures: list[Image.Image]) -> None:
    with pytest.raises(FoveateError, match="1 questions about 2 sets of pictures"):
        encode(model, processor, [[pictures[0]], [pictures[1]]], ["w7"])
    with pytest.raises(FoveateError, match="prompt 1 has no picture"):
        encode(model, processor, [[pictures[0]], []], ["w7", "w8"])
    with pytest.raises(FoveateError, match="the question of prompt 0 is empty"):
        encode(model, processor, [[pictures[0]]], [" "])
    with pytest.raises(FoveateError, match="prompt 0 holds '<image>', which this model reads as a mark"):
        encode(model, processor, [[pictures[0]]], ["w7 <image>"])
    bare = tiny.processor(model)
    bare.chat_template = None
    with pytest.raises(FoveateError, match="LlavaProcessor has no chat template"):
        encode(model, bare, [[pictures[0]]], ["w7"])


def test_deep_greys_reach_the_model_scaled(model: Any, processor: Any) -> None:
    """Half of 65535 is half of 255; a plain conversion makes it white."""
    deep, flat = Image.new("I;16", (24, 24), 0x8000), Image.new("RGB", (24, 24), (128, 128, 128))
    inputs = encode(model, processor, [[deep], [flat]], ["w7", "w7"])
    assert inputs["pixel_values"][0].equal(inputs["pixel_values"][1])
    with pytest.raises(FoveateError, match="floating-point numbers"):
        encode(model, processor, [[Image.new("F", (24, 24))]], ["w7"])
