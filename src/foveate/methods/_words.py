"""What methods share that read the text after an image in the decoder's prompt."""

from __future__ import annotations

from torch import Tensor

from foveate.core import FoveateError, Signals


def words_after(signals: Signals, what: str) -> Tensor:
    """(B, T) bool: the text that stands after the image.

    Args:
        what: the method and what it does with that text, for the message: "MMTok reads the text after the image".

    Raises:
        FoveateError: an image is followed by none.
    """
    assert signals.text_mask is not None and signals.after_image is not None
    mask = signals.text_mask & signals.after_image
    silent = (~mask.any(dim=-1)).nonzero().flatten().tolist()
    if silent:
        raise FoveateError(
            f"{what}, but image {silent[0]} is followed by none; put the question after the image, or use a method "
            "that does not read the text"
        )
    return mask
