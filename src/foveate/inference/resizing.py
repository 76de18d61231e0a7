"""Scales pictures down before the processor, to the largest of which it makes no more tokens than a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from foveate import methods
from foveate.core import FoveateError, Keep, Method, tokens_to_keep
from foveate.families import family_of
from foveate.inference.answers import encode
from foveate.prune import check_prunable
from foveate.runtime.support import why_not
from foveate.runtime.tuned import check_tuned
from foveate.runtime.wrapped import unwrapped
from foveate.spec import format as format_spec

if TYPE_CHECKING:
    from transformers import BatchFeature

Size: TypeAlias = tuple[int, int]
"""Width and height, as PIL gives them."""


def scale_down(model: Any, processor: Any, picture: Image.Image, keep: Keep = 0.25) -> Image.Image:
    """The largest copy of a picture, of the same proportions, that becomes no more tokens than `keep`.

    Args:
        model: a loaded vision-language model of transformers, for the family that it is of.
        processor: its processor.
        keep: tokens of the copy at most, or a share of those of the whole picture.

    Returns:
        The picture at a lower resolution (bicubic), or itself where it fits.

    Raises:
        FoveateError: the model's processor makes as many tokens of a smaller picture, or the smallest of this one has
            more; or `keep` is above the tokens of the whole picture.
    """
    kind: Any = methods.get("resize")
    return Scaler(model, processor, kind(keep=keep)).scaled(picture)


def scaling(stages: Sequence[Method]) -> Method | None:
    """The method that scales pictures before the processor, where a rival is one; None where it prunes tokens.

    Raises:
        FoveateError: other stages come beside it.
    """
    found = [stage for stage in stages if any(part.site == "picture" for part in stage.parts())]
    if found and len(stages) > 1:
        raise FoveateError(
            f"{format_spec(tuple(stages))} joins stages to one that scales the picture, of whose tokens none is left "
            f"that they could count; give {format_spec(found[0])} alone"
        )
    return found[0] if found else None


def check_runnable(
    model: Any, processor: Any, stages: Sequence[Method], sizes: Iterable[Size] = (), **options: Any
) -> None:
    """Refuse stages that can neither prune this model nor scale its pictures; nothing is encoded.

    Args:
        sizes: of the pictures that will come.
        options: further arguments of `prune`.

    Raises:
        FoveateError: as `prune`, or as `Scaler` and its `size`.
    """
    method = scaling(stages)
    if method is None:
        check_prunable(model, [*stages], processor=processor, **options)
    else:
        Scaler(model, processor, method).check(sizes)


def scalers_of(model: Any, processor: Any, rivals: Mapping[str, Sequence[Method]]) -> dict[str, Scaler]:
    """What scales the pictures of those rivals that do no more, by spec.

    Raises:
        FoveateError: the model's processor makes as many tokens of a smaller picture, or other stages come beside one.
    """
    found = {name: scaling(stages) for name, stages in rivals.items()}
    return {name: Scaler(model, processor, method) for name, method in found.items() if method is not None}


class Scaler:
    """Scales pictures for one model to the budget of one method; sizes that come again are looked up.

    Raises:
        FoveateError: the model's processor makes as many tokens of a smaller picture, or the model has an adapter that
            was tuned under another spec.
    """

    def __init__(self, model: Any, processor: Any, method: Any) -> None:
        model = unwrapped(model)
        check_tuned(model, (method,))
        family = family_of(model)
        reason = why_not(method, family, family.tower_of(model)[1])
        if reason is not None:
            raise FoveateError(f"{format_spec(method)} {reason}")
        self.model, self.processor, self.method = model, processor, method
        self._token = family.image_token_id(model.config)
        self._count = counting(processor)
        self._sizes: dict[Size, Size] = {}

    def size(self, whole: Size) -> Size:
        """Width and height to which a picture of a size is scaled.

        Raises:
            FoveateError: the smallest such picture has more tokens than the budget, or the whole one has fewer.
        """
        if whole not in self._sizes:
            self._sizes[whole] = self._largest(whole)
        return self._sizes[whole]

    def tokens(self, size: Size) -> int:
        """Visual tokens that the processor makes of a picture of a size.

        Raises:
            FoveateError: it takes none so narrow.
        """
        count = self._count(size)
        if count is None:
            raise FoveateError(f"the processor takes no picture as narrow as {size[0]} x {size[1]} pixels; crop it")
        return count

    def _largest(self, whole: Size) -> Size:
        original = self.tokens(whole)
        budget, least = tokens_to_keep(self.method.keep, original), original
        for side in range(max(whole), 0, -1):
            size = scaled_size(whole, side)
            count = self._count(size)
            if count is not None and count <= budget:
                return size
            least = min(least, least if count is None else count)
        raise FoveateError(
            f"{format_spec(self.method)} allows {budget} tokens of a picture of {whole[0]} x {whole[1]} pixels, and "
            f"the processor makes {least} at least however small it is; the nearest is keep={least}"
        )

    def scaled(self, picture: Image.Image) -> Image.Image:
        """The picture at the size that its budget buys; itself where that is its own.

        Raises:
            FoveateError: as `size`.
        """
        size = self.size(picture.size)
        return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)

    def encode(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str]) -> BatchFeature:
        """Model inputs of a batch of prompts about pictures scaled down, as `foveate.inference.answers.encode`.

        Raises:
            FoveateError: as `encode` and `size`; or the processor made another number of tokens than it says of
                pictures of such sizes.
        """
        small = [[self.scaled(picture) for picture in pictures] for pictures in images]
        inputs = encode(self.model, self.processor, small, questions)
        made = (inputs["input_ids"] == self._token).sum(dim=1).tolist()
        said = [sum(self.tokens(picture.size) for picture in pictures) for pictures in small]
        if made != said:
            raise FoveateError(
                f"the processor made {made} visual tokens of the prompts' pictures, and says {said} of their sizes; "
                f"{format_spec(self.method)} cannot count with it"
            )
        return inputs

    def check(self, sizes: Iterable[Size]) -> None:
        """Refuse, before any work, pictures that cannot be scaled to the budget.

        Raises:
            FoveateError: as `size`.
        """
        for size in sizes:
            self.size(size)


def scaled_size(whole: Size, side: int) -> Size:
    """The size, in the same proportions, whose longer side is `side`; rounded half to even, at least 1."""
    longest = max(whole)
    width, height = (max(1, round(one * side / longest)) for one in whole)
    return width, height


def counting(processor: Any) -> Callable[[Size], int | None]:
    """How many visual tokens a processor makes of a picture of a size, by its own arithmetic; None where it takes none.

    Raises:
        FoveateError: it does not say.
    """
    pictures = getattr(processor, "image_processor", None)
    if hasattr(pictures, "merge_size") and hasattr(pictures, "get_number_of_image_patches"):
        return lambda size: _tokens(pictures, size)
    longest = dict(getattr(pictures, "size", None) or {}).get("longest_edge")
    side = getattr(processor, "patch_size", None)
    if longest is None or side is None:
        raise FoveateError(
            f"{type(processor).__name__} does not say how many tokens it makes of a picture of some size, so no "
            "picture can be scaled to a budget"
        )
    side *= getattr(processor, "spatial_merge_size", 1)

    def cut(size: Size) -> int:  # Pixtral's: down to the longest side, then up to whole tokens
        ratio = max(1.0, max(size) / longest)
        across, down = (-(-math.floor(one / ratio) // side) for one in size)
        return across * down

    return cut


def _tokens(pictures: Any, size: Size) -> int | None:
    """Of a processor that says how many patches it makes; none of a line so thin that it refuses it."""
    try:
        patches: int = pictures.get_number_of_image_patches(size[1], size[0], {})
    except ValueError:
        return None
    return patches // pictures.merge_size**2
