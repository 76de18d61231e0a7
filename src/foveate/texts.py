"""Texts that users write for a model: refused where they hold marks that only its chat template and processor write."""

from __future__ import annotations

from typing import Any

from foveate.core import FoveateError, short

_PLACEHOLDERS = ("image_token", "video_token", "audio_token", "boi_token")
"""What processors look for in a text before it is tokenized, by their attributes."""


def check_characters(text: str, what: str) -> None:
    """Refuse a text that no tokenizer takes: one with half of a character, as undecodable bytes leave it.

    Args:
        what: the text, for the message.

    Raises:
        FoveateError: naming the first such half and its place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise FoveateError(
            f"{what} holds half a character, {code} at place {error.start}, which stands for no text; write it in UTF-8"
        ) from error


def check_text(processor: Any, text: str, what: str) -> None:
    """Refuse a text that a model would not read as text alone.

    A tokenizer makes special tokens of certain words wherever they stand, and a processor pictures: a question that
    holds the mark of an ending ends there. Taking such words out, or apart, would ask something else than was asked.
    Marks that are words like others, such as `USER`, cannot be told from text.

    Args:
        processor: of the model, or its tokenizer.
        what: the text, for the message.

    Raises:
        FoveateError: the text holds half a character, or names such a mark.
    """
    check_characters(text, what)
    placeholders = (getattr(processor, name, None) for name in _PLACEHOLDERS)
    mark = next((one for one in placeholders if isinstance(one, str) and one in text), None)
    mark = _special(getattr(processor, "tokenizer", processor), text) if mark is None else mark
    if mark is not None:
        raise FoveateError(
            f"{what} holds {short(repr(mark))}, which this model reads as a mark of its own and not as text; write it "
            "another way, such as with spaces between its signs"
        )


def _special(tokenizer: Any, text: str) -> str | None:
    """The first special token that a tokenizer makes of words in a text; None without."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    special -= set(tokenizer("", add_special_tokens=False).input_ids)  # what some write in front of every text
    for number in tokenizer(text, add_special_tokens=False).input_ids:
        if number in special and not (number == tokenizer.unk_token_id and not _written(tokenizer, text, number)):
            return str(tokenizer.convert_ids_to_tokens(number))
    return None


def _written(tokenizer: Any, text: str, number: int) -> bool:
    """Whether a text holds the very word of a token that also stands for all unknown ones."""
    word = tokenizer.convert_ids_to_tokens(number)
    if not tokenizer.is_fast:
        return word in text
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(found.input_ids, found.offset_mapping, strict=True)
    return any(one == number and text[start:end].strip() == word for one, (start, end) in pairs)
