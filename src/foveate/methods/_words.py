"""What methods share that meet words: in CLIP's joint space, or those after an image among what the decoder gets."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from foveate.core import FoveateError, Signals
from foveate.ops.device import refuse_any

WordSpace: TypeAlias = Literal["clip", "decoder"]
"""Where tokens meet words: in CLIP's joint space, or among the embeddings that the decoder gets."""


def question_signals(space: WordSpace) -> tuple[str, ...]:
    """What `question_in` and the tokens beside it need."""
    return ("image_clip", "text_clip") if space == "clip" else ("features", "text", "text_mask", "after_image")


def check_word_space(space: WordSpace, official: bool) -> None:
    """Refuse the decoder's space where the authors' code is asked for, which knows CLIP's alone.

    Raises:
        FoveateError: both are.
    """
    if official and space == "decoder":
        raise FoveateError(
            "official=True is the authors' code, which compares in CLIP's joint space, not in space='decoder'; leave "
            "out one of the two"
        )


def tokens_and_question(signals: Signals, space: WordSpace, name: str) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C) and pieces of the question (B, Q, C) in one space.

    Among the embeddings that the decoder gets, the question is one piece: the mean of the text after the image.

    Raises:
        FoveateError: an image is followed by no text.
    """
    if space == "clip":
        assert signals.image_clip is not None and signals.text_clip is not None
        return signals.image_clip, signals.text_clip
    assert signals.features is not None and signals.text is not None
    mask = words_after(signals, f"{name} reads the text after the image")
    # Its length does not matter to a cosine.
    return signals.features, signals.text.float().masked_fill(~mask[..., None], 0.0).sum(dim=1, keepdim=True)


def words_after(signals: Signals, what: str) -> Tensor:
    """(B, T) bool: the text that stands after the image.

    Args:
        what: the method and what it does with that text, for the message: "MMTok reads the text after the image".

    Raises:
        FoveateError: an image is followed by none.
    """
    assert signals.text_mask is not None and signals.after_image is not None
    mask = signals.text_mask & signals.after_image
    for image, silent in enumerate(~mask.any(dim=-1)):
        refuse_any(
            silent.sum(),
            f"{what}, but image {image} is followed by none; put the question after the image, or use a method that "
            "does not read the text",
        )
    return mask
