"""CLIP's joint space: which text is the question, what both heads make of it, and what is refused before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import tiny
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel

import foveate
from foveate.core import FoveateError, Signals
from foveate.forms import Scorer
from foveate.runtime.encoder.joint_space import Questions
from foveate.scenes import mini

QUESTION = "what color is behind the dog ?"


@dataclass(frozen=True)
class Reader(Scorer):
    """Keeps the first tokens and remembers what it was shown."""

    needs: ClassVar[tuple[str, ...]] = ("image_clip", "text_clip", "word_clip", "word_mask")  # type: ignore[assignment]
    seen: ClassVar[list[Signals]] = []  # emptied by `shown`

    def score(self, signals: Signals) -> Tensor:
        self.seen.append(signals)
        return -signals.index.float()


def shown(model: Any, given: dict[str, Tensor], **arguments: Any) -> Signals:
    Reader.seen.clear()
    with foveate.prune(model, Reader(keep=4), **arguments):
        model.generate(**given, max_new_tokens=2)
    (signals,) = Reader.seen
    return signals


def test_patches_go_through_the_head_of_clip() -> None:
    model = tiny.model()
    clip, tokenizer = tiny.clip(model)
    given = tiny.inputs(model, "3i4", "2i9")
    signals = shown(model, given, clip=(clip, tokenizer), question=QUESTION)
    with torch.no_grad():
        hidden = clip.vision_model(given["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = clip.visual_projection(clip.vision_model.post_layernorm(hidden))
    assert signals.image_clip is not None
    torch.testing.assert_close(signals.image_clip, expected)


def test_a_short_question_is_what_clip_says_of_it() -> None:
    model = tiny.model()
    clip, tokenizer = tiny.clip(model)
    signals = shown(model, tiny.inputs(model, "3i4"), clip=(clip, tokenizer), question=QUESTION)
    ids = tokenizer(QUESTION, return_tensors="pt")
    with torch.no_grad():
        expected = clip.get_text_features(**ids).pooler_output
        words = clip.text_projection(clip.text_model(**ids).last_hidden_state)
    assert signals.text_clip is not None and signals.word_clip is not None and signals.word_mask is not None
    torch.testing.assert_close(signals.text_clip, expected[None])
    # Of 12 positions: the start, 7 words, the end, padding.
    assert signals.word_mask.tolist() == [[False] + [True] * 7 + [False] * 4]
    torch.testing.assert_close(signals.word_clip[:, :9], words)


def test_a_long_question_is_read_in_pieces_and_averaged() -> None:
    model = tiny.model()
    clip, tokenizer = tiny.clip(model, longest=6)  # four words at a time
    signals = shown(model, tiny.inputs(model, "3i4"), clip=(clip, tokenizer), question=QUESTION)
    pieces = [tokenizer(piece, return_tensors="pt") for piece in ("what color is behind", "the dog ?")]
    with torch.no_grad():
        expected = torch.stack([clip.get_text_features(**ids).pooler_output for ids in pieces]).mean(dim=0)
    assert signals.text_clip is not None and signals.word_mask is not None
    torch.testing.assert_close(signals.text_clip, expected[None])
    assert signals.word_mask.tolist() == [[False, True, True, True, True, False, False, True, True, True, False, False]]


def test_every_row_has_its_own_question() -> None:
    model = tiny.model()
    clip, tokenizer = tiny.clip(model)
    given = tiny.inputs(model, "3i4", "2i1i5")
    asked = ["is there a cat ?", QUESTION]
    signals = shown(model, given, clip=(clip, tokenizer), question=asked)
    assert signals.text_clip is not None and signals.text_clip.shape == (3, 1, 20)
    torch.testing.assert_close(signals.text_clip[1], signals.text_clip[2])
    alone = shown(model, tiny.alone(given, 0, tiny.IMAGE), clip=(clip, tokenizer), question=asked[0])
    assert alone.text_clip is not None
    torch.testing.assert_close(signals.text_clip[:1], alone.text_clip)


def test_mini_brings_its_clip_and_finds_the_question_in_the_prompt() -> None:
    model = AutoModelForImageTextToText.from_pretrained(foveate.MINI, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(foveate.MINI)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pixels = torch.zeros(1, 3, 336, 336)
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.cat([torch.full((1, 576), image) if one == image else one.view(1, 1) for one in ids[0]], dim=1)
    given = {"input_ids": ids, "pixel_values": pixels}
    read = shown(model, given, processor=processor)
    told = shown(model, given, question=QUESTION)
    assert read.text_clip is not None and told.text_clip is not None
    assert torch.equal(read.text_clip, told.text_clip)
    clip = CLIPModel.from_pretrained(Path(foveate.MINI) / "clip", dtype=torch.float32)
    with torch.no_grad():
        expected = clip.get_text_features(**mini.clip_tokenizer()(QUESTION, return_tensors="pt")).pooler_output
    torch.testing.assert_close(read.text_clip[0], expected)


def test_without_a_template_the_text_after_the_image_is_taken_whole() -> None:
    class Plain:
        tokenizer = tiny.tokenizer()

    asked = Questions(Plain(), None)
    assert asked.around == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": QUESTION}, r"this model brings no CLIP; give clip=.*openai/clip-vit-large-patch14-336"),
        ({"clip": "nowhere"}, "reads the question: give processor=.* or question="),
        ({"clip": 3, "question": QUESTION}, "clip=int is neither a folder or hub id"),
        ({"clip": "no/such-clip", "question": QUESTION}, "clip='no/such-clip' cannot be loaded as a CLIPModel"),
    ],
)
def test_what_is_missing_is_said_before_any_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        foveate.prune(tiny.model(), Reader(keep=4), **arguments)


def test_a_clip_of_another_width_is_refused() -> None:
    other = tiny.model()
    clip, tokenizer = tiny.clip(other)
    clip.vision_embed_dim = 48
    with pytest.raises(FoveateError, match="vision tower of width 48, the model's encoder has 32"):
        foveate.prune(tiny.model(), Reader(keep=4), clip=(clip, tokenizer), question=QUESTION)


def test_another_number_of_questions_than_rows_is_refused() -> None:
    model = tiny.model()
    with (
        foveate.prune(model, Reader(keep=4), clip=tiny.clip(model), question=["a", "b"]),
        pytest.raises(FoveateError, match="2 questions were given for a prompt of 1 rows"),
    ):
        model.generate(**tiny.inputs(model, "3i4"))


def test_an_image_without_question_is_refused() -> None:
    model = tiny.model()

    class Plain:
        tokenizer = tiny.tokenizer()

    with (
        foveate.prune(model, Reader(keep=4), clip=tiny.clip(model), processor=Plain()),
        pytest.raises(FoveateError, match="no text follows the image in row 0"),
    ):
        model.generate(**tiny.inputs(model, "3i"))


def test_an_encoder_that_clip_does_not_know_cannot_serve() -> None:
    model = tiny.model(tower="siglip")
    with pytest.raises(FoveateError, match=r"needs image_clip, text_clip, word_clip, word_mask, which llava-1.5 with"):
        foveate.prune(model, Reader(keep=4), question=QUESTION)
