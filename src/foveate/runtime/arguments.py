"""The arguments of a model's calls: what this transformers calls them, and what of them is about pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from foveate.runtime.seams import FORMER

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments of a call that have a column for each token, beside ids and mask."""

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""The argument that brings the pixels, by what they show."""

SIZES = (
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "image_merge_sizes",
    "image_position_ids",
    "batch_num_images",
)
"""Arguments that state how the pictures lie."""


def named(function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a function is called with, by the names that its arguments have now."""
    signature = inspect.signature(function)
    bound = signature.bind_partial(*arguments, **options).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return renamed(bound)


def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that this transformers has for them."""
    made = dict(given)
    for former, name in FORMER.items():
        value = made.pop(former, None)
        if value is not None and made.get(name) is None:
            made[name] = value
    return made


def kind_of(given: Mapping[str, Any]) -> str:
    """What a call brings: "video" or "image"."""
    return "image" if given.get(PIXELS["video"]) is None else "video"


def bring_pixels(given: Mapping[str, Any]) -> bool:
    """Whether pictures or videos come with a call."""
    return any(given.get(name) is not None for name in PIXELS.values())


def accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of a call, those that a function has names for."""
    parameters = inspect.signature(function).parameters.values()
    names = (one.name for one in parameters if one.kind is not one.VAR_KEYWORD)
    return {name: given[name] for name in names if name in given}


def text_config(model: Any) -> Any:
    """The configuration of the decoder."""
    return model.config.get_text_config(decoder=True)
