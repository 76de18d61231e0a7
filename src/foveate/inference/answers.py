"""Greedy answers to questions about pictures, in left-padded batches, through stock `generate()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from foveate.core import FoveateError
from foveate.inference.pictures import on_white
from foveate.inference.videos import Clip
from foveate.runtime.limits import check_room
from foveate.texts import check_text

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from transformers import BatchFeature


def prompt(processor: Any, question: str, images: int = 1, kind: str = "image") -> str:
    """The text of one user turn, `images` pictures before the question, in the model's own chat template.

    Args:
        kind: "video" where they are videos.

    Raises:
        FoveateError: as `templated`.
    """
    content = [*({"type": kind} for _ in range(images)), {"type": "text", "text": question}]
    return templated(processor, [{"role": "user", "content": content}])


def templated(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a conversation in the model's own chat template, up to where the answer begins.

    Args:
        messages: as chat templates take them, each a role and its parts.

    Raises:
        FoveateError: the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise FoveateError(
            f"{type(processor).__name__} has no chat template, so the prompt's wording is not known; "
            "set processor.chat_template, or choose a checkpoint tuned for chat"
        )
    text: str = processor.apply_chat_template([*messages], add_generation_prompt=True)
    return text


def encode(
    model: Any, processor: Any, images: Sequence[Sequence[Image.Image | Clip]], questions: Sequence[str]
) -> BatchFeature:
    """Model inputs of a batch of prompts, each its pictures before its question, padded on the left.

    Args:
        images: B sequences of pictures, or B of videos, at least one each.
        questions: B texts.

    Raises:
        FoveateError: another number of questions than of sequences, a prompt without picture, pictures beside videos,
            an empty question or one that holds special tokens, or a processor without chat template.
    """
    kinds = {"video" if isinstance(one, Clip) else "image" for row in images for one in row}
    if len(kinds) > 1:
        raise FoveateError("pictures and videos cannot be asked about in one batch; give them in batches of their own")
    if len(images) != len(questions):
        raise FoveateError(f"{len(questions)} questions about {len(images)} sets of pictures; give one question each")
    for row, (pictures, question) in enumerate(zip(images, questions, strict=True)):
        if not pictures:
            raise FoveateError(f"prompt {row} has no picture; give at least one")
        if not question.strip():
            raise FoveateError(f"the question of prompt {row} is empty; ask at least one word")
        check_text(processor, question, f"the question of prompt {row}")
    kind = kinds.pop() if kinds else "image"
    texts = [prompt(processor, text, len(row), kind) for row, text in zip(images, questions, strict=True)]
    return prepared(model, processor, images, texts)


def prepared(
    model: Any, processor: Any, images: Sequence[Sequence[Image.Image | Clip]], texts: Sequence[str]
) -> BatchFeature:
    """Model inputs of B texts in the model's chat template, padded on the left.

    Args:
        images: the pictures whose marks each text holds, in their order; of all texts none, or of each at least one.
            Or the videos.
    """
    start = processor.tokenizer.bos_token
    inputs = processor(
        **_shown(images),
        text=list(texts),
        padding=True,
        padding_side="left",
        # Some chat templates write the token that starts a text, others leave it to the tokenizer.
        add_special_tokens=not (start and texts[0].startswith(start)),
        return_tensors="pt",
    )
    placed: BatchFeature = inputs.to(model.device, dtype=model.dtype)
    return placed


def _shown(images: Sequence[Sequence[Image.Image | Clip]]) -> dict[str, Any]:
    """Pictures or videos as processors take them; some must be told which row each belongs to."""
    clips = [one for row in images for one in row if isinstance(one, Clip)]
    if not clips:
        pictures = [[on_white(one) for one in row if not isinstance(one, Clip)] for row in images]
        return {"images": pictures if any(pictures) else None}
    frames = [[one.frames for one in row if isinstance(one, Clip)] for row in images]
    return {"videos": frames, "video_metadata": [one.metadata for one in clips], "do_sample_frames": False}


def decode(processor: Any, model: Any, output: Tensor, prompt_length: int) -> list[str]:
    """The texts of B generated rows: what follows the prompt, up to the first token that ends a text.

    Args:
        output: (B, L) as `generate` returns it, prompt included.
    """
    ends = torch.tensor(end_tokens(model), device=output.device, dtype=output.dtype)
    answers = []
    for row in output[:, prompt_length:]:
        found = torch.isin(row, ends).nonzero()
        answers.append(row[: int(found[0])] if len(found) else row)
    texts: list[str] = processor.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() for text in texts]


def end_tokens(model: Any) -> list[int]:
    """Ids of the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def greedy(model: Any, inputs: Any, *, max_new_tokens: int, **options: Any) -> Tensor:
    """`model.generate` without sampling or beams, whatever the checkpoint's defaults are; (B, L), prompt included.

    Raises:
        FoveateError: the prompt, or with the longest answer, leaves the decoder's context.
    """
    check_room(model, inputs, max_new_tokens)
    # Sampling fields that a checkpoint sets would draw a warning with each greedy call.
    plain = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    with torch.inference_mode():
        output: Tensor = model.generate(**inputs, **plain, max_new_tokens=max_new_tokens, **options)
    return output


def answer(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy answers to one question about each picture, as one batch.

    Args:
        images: B pictures.
        questions: B questions, one for each.

    Raises:
        FoveateError: as `encode`.
    """
    inputs = encode(model, processor, [[image] for image in images], questions)
    output = greedy(model, inputs, max_new_tokens=max_new_tokens)
    return decode(processor, model, output, inputs["input_ids"].shape[1])
