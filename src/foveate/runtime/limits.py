"""What a prompt may not be: pixels that are no numbers, and more positions than the decoder's context has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.core import FoveateError
from foveate.families import family_of

_STRETCHED = ("linear", "dynamic", "yarn")  # of these, some checkpoints state the context before, some after stretching


def context_of(config: Any) -> int | None:
    """Positions that the decoder of a model is made for; None where its configuration does not say.

    Rotary embeddings that are stretched by a factor count with it, also where `max_position_embeddings` may be meant
    to hold it already: no prompt is refused that one reading of the configuration allows. Layers that see a window
    do not count: they see the last tokens of any prompt.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, Mapping)]
    stretched = [
        int((kind.get("original_max_position_embeddings") or stated) * (kind.get("factor") or 1.0))
        for kind in kinds
        if kind.get("rope_type") in _STRETCHED
    ]
    return max([stated, *stretched])


def may_leave(context: int, tokens: int, given: Mapping[str, Any]) -> bool:
    """Whether so many tokens can take more positions than there are, so that it must be looked at.

    A token moves on by one position, and those of a picture together by less; only those of a video by its seconds.
    """
    return tokens > context or given.get("second_per_grid_ts") is not None


def check_reach(reach: int, context: int) -> None:
    """Refuse a prompt that takes `reach` positions of a context of fewer.

    Methods of every site leave the kept tokens the positions that they have in the whole prompt, since answers suffer
    where they are counted anew. A prompt that is too long is so when it is pruned, too.

    Raises:
        FoveateError: naming both.
    """
    if reach > context:
        raise FoveateError(
            f"the prompt takes {reach} positions, but the context of this decoder has {context}. Pruned or not: tokens "
            "that stay keep their positions. Give a shorter text, or fewer or smaller pictures"
        )


def room_after(reach: int, context: int) -> int:
    """Tokens of an answer that fit behind a prompt of `reach` positions; the last one is written, but never read."""
    return context - reach + 1


def check_room(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> None:
    """Refuse a prompt that alone, or with the longest answer that is asked for, leaves the decoder's context.

    Args:
        inputs: of (B, S) prompts as a processor makes them: ids, mask, sizes of pictures.

    Raises:
        FoveateError: naming what is taken and what there is.
    """
    context, ids = context_of(model.config), inputs["input_ids"]
    if context is None or not may_leave(context, ids.shape[1] + new_tokens - 1, inputs):
        return
    reach = _reach(model, inputs)
    check_reach(reach, context)
    room = room_after(reach, context)
    if new_tokens > room:
        raise FoveateError(
            f"max_new_tokens={new_tokens} leaves the decoder's context: the prompt takes {reach} of its {context} "
            f"positions; the most is max_new_tokens={room}"
        )


def room_behind(model: Any, inputs: Mapping[str, Any]) -> int | None:
    """Tokens of an answer that fit behind (B, S) prompts; None where nothing bounds them.

    Raises:
        FoveateError: a prompt leaves the decoder's context by itself.
    """
    context = context_of(model.config)
    if context is None:
        return None
    reach = _reach(model, inputs)
    check_reach(reach, context)
    return room_after(reach, context)


def _reach(model: Any, inputs: Mapping[str, Any]) -> int:
    """One past the largest position of any row, as generate() counts: padding does not, pictures may share some."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    try:
        count = family_of(model).positions
    except FoveateError:  # none that can be pruned, but it may answer
        count = None
    if count is None:
        return int(mask.sum(dim=1).max())
    return int(count(model, ids, mask.bool(), dict(inputs), ids.new_zeros(ids.shape[0])).max()) + 1


def unfit(pixels: Iterable[Any], device: torch.device) -> Tensor:
    """How many of some pixel values are NaN or infinite, as a number on `device`, not waited for."""
    count = torch.zeros((), dtype=torch.int64, device=device)
    for value in pixels:
        for one in value if isinstance(value, list | tuple) else (value,):
            count = count + (~one.isfinite()).sum().to(device)
    return count
