"""Fits a method's free number to a model's own pictures: `calibrate(model, method, images, target)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.core import FoveateError, Keep, Method, Signals, check_keep
from foveate.prune import check_prunable


def calibrate(model: Any, method: Method, images: Any, target: Keep, *, processor: Any = None) -> Method:
    """The same method with the setting whose average count over these pictures is nearest to `target`.

    Args:
        model: a loaded vision-language model.
        images: pixel values, (B, C, height, width) or several such batches; what a processor made of pictures, sizes
            among it, or several of these; or PIL images, which need `processor`.
        target: tokens per image on average, or a share of them.

    Returns:
        The fitted method.

    Raises:
        FoveateError: the method has nothing to fit or cannot run on this model, no picture was given, or the target is
            out of reach.
    """
    fit = getattr(method, "calibrate", None)
    if fit is None:
        raise FoveateError(
            f"{method} has nothing to calibrate; image_text_interaction has its alpha, pixelprune its threshold"
        )
    check_keep(target, "target")
    check_prunable(model, method)
    batches = _batches(images, processor)
    if not batches:
        raise FoveateError("calibration needs at least one picture")
    # The method checks its own fields before it asks for the first picture.
    fitted: Method = fit((signals for batch in batches for signals in _signals(model, method, batch)), target)
    return fitted


def _batches(images: Any, processor: Any) -> list[Any]:
    from torch import Tensor

    given: list[Any] = [images] if isinstance(images, Tensor | Mapping) else list(images)
    ready = [one for one in given if isinstance(one, Tensor | Mapping)]
    for pixels in ready:
        if isinstance(pixels, Tensor) and pixels.ndim != 4:
            raise FoveateError(
                f"pixel values have shape {tuple(pixels.shape)}; a batch of (B, C, height, width) is needed, or all "
                "that the processor made"
            )
    if len(ready) == len(given):
        return [batch for batch in given if isinstance(batch, Mapping) or batch.shape[0]]
    if ready:
        raise FoveateError(f"{len(ready)} of {len(given)} pictures are pixel values; give one kind")
    if processor is None:
        raise FoveateError("pictures that are no pixel values need processor=, the model's own")
    from foveate.inference.pictures import on_white

    return [processor.image_processor(on_white(image), return_tensors="pt") for image in given]


def _signals(model: Any, method: Method, batch: Any) -> list[Signals]:
    """What the method would see of the pictures of a batch."""
    from torch import Tensor

    from foveate.runtime.arguments import renamed
    from foveate.runtime.encoder.observe import signals_of

    return signals_of(model, method.parts()[0], batch if isinstance(batch, Tensor) else renamed(batch))
