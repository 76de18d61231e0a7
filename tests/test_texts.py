"""Texts of users: what a model would not read as text is refused, and everything else is let through."""

from __future__ import annotations

from typing import Any

import pytest
from models import tiny, tiny_processors
from PIL import Image
from transformers import AutoProcessor

import foveate
from foveate.core import FoveateError
from foveate.inference.answers import encode
from foveate.texts import check_characters, check_text

REST = "which this model reads as a mark of its own and not as text; write it another way, such as with spaces between"


@pytest.fixture(scope="module")
def mini() -> Any:
    return AutoProcessor.from_pretrained(foveate.MINI)


@pytest.mark.parametrize("token", ["<pad>", "<bos>", "<eos>", "<image>"])
@pytest.mark.parametrize("text", ["{}", "what is left ?{}", "what{}is left ?", "{} what is left ?"])
def test_special_tokens_are_refused_wherever_they_stand(mini: Any, token: str, text: str) -> None:
    with pytest.raises(FoveateError) as error:
        check_text(mini, text.format(token), "the question")
    assert str(error.value).startswith(f"the question holds {token!r}, {REST}")


@pytest.mark.parametrize(
    "text",
    ["what color is behind the dog ?", "words that it never saw", "< eos >", "eos", "pad", "<EOS>", "\u00e9", ""],
)
def test_other_words_are_let_through(mini: Any, text: str) -> None:
    """Unknown ones too, though the token that stands for them is a special one."""
    check_text(mini, text, "the question")
    check_text(mini.tokenizer, text, "the question")


@pytest.mark.parametrize("name", tiny_processors.PROCESSORS)
def test_every_processor_refuses_its_own_marks(name: str) -> None:
    processor = tiny_processors.PROCESSORS[name]()
    check_text(processor, "w7 w8 TILE some w9", "the question")
    words = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    words |= {getattr(processor, "image_token", None), getattr(processor, "video_token", None)} - {None}
    assert len(words) >= 3
    for word in words:
        with pytest.raises(FoveateError, match="the question holds '"):
            check_text(processor, f"w7 {word} w8", "the question")


def test_a_slow_tokenizer_is_asked_for_the_word(mini: Any) -> None:
    class Slow:
        is_fast, unk_token_id, all_special_ids = False, 0, [0]

        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoded", (), {"input_ids": [0 if word not in ("a", "b") else 7 for word in text.split()]})

        def convert_ids_to_tokens(self, number: int) -> str:
            return {0: "<unk>", 7: "a"}[number]

    check_text(Slow(), "a strange b", "the question")
    with pytest.raises(FoveateError, match="holds '<unk>'"):
        check_text(Slow(), "a <unk> b", "the question")


@pytest.mark.parametrize(("text", "told"), [("\ud800", "U+D800 at place 0"), ("what \udcff ?", "U+DCFF at place 5")])
def test_half_a_character_is_refused(mini: Any, text: str, told: str) -> None:
    """As bytes that are no UTF-8 arrive from a command line."""
    message = f"the question holds half a character, {told}, which stands for no text; write it in UTF-8"
    for check in (lambda: check_characters(text, "the question"), lambda: check_text(mini, text, "the question")):
        with pytest.raises(FoveateError) as error:
            check()
        assert str(error.value) == message
    check_characters("\U0001f415 \u00e9 \x00", "the question")


def test_prompts_are_looked_at() -> None:
    model = tiny.model()
    processor, picture = tiny.processor(model), Image.new("RGB", (24, 24))
    with pytest.raises(FoveateError, match="the question of prompt 1 holds '<image>'"):
        encode(model, processor, [[picture], [picture]], ["w7", "w7 <image>"])
    with pytest.raises(FoveateError, match=r"the question of prompt 0 holds half a character, U\+D800"):
        encode(model, processor, [[picture]], ["w7 \ud800"])


def test_a_question_for_clip_is_looked_at() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    for question, told in (("a dog <end>", "holds '<end>'"), ("\ud800", "holds half a character")):
        handle = foveate.prune(model, "trim", clip=tiny.clip(model), question=question)
        with handle, pytest.raises(FoveateError, match=f"the question for CLIP {told}"):
            model.generate(**given, max_new_tokens=1)
