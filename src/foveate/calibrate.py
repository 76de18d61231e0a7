"""Fits a method's free number to a model's own pictures: `calibrate(model, method, images, target)`."""

from __future__ import annotations

from typing import Any

from foveate.core import FoveateError, Keep, Method, Signals, check_keep
from foveate.prune import prune


def calibrate(model: Any, method: Method, images: Any, target: Keep, *, processor: Any = None) -> Method:
    """The same method with the setting whose average count over these pictures is nearest to `target`.

    Args:
        model: a loaded vision-language model.
        images: pixel values, (B, C, height, width) or several such batches; or PIL images, which need `processor`.
        target: tokens per image on average, or a share of them.

    Returns:
        The fitted method.

    Raises:
        FoveateError: the method has nothing to fit or cannot run on this model, no picture was given, or the target is
            out of reach.
    """
    fit = getattr(method, "calibrate", None)
    if fit is None:
        raise FoveateError(f"{method} has nothing to calibrate; image_text_interaction has its alpha")
    check_keep(target, "target")
    prune(model, method)  # installs nothing; refuses what the model cannot serve
    batches = _batches(images, processor)
    if not batches:
        raise FoveateError("calibration needs at least one picture")
    # The method checks its own fields before it asks for the first picture.
    fitted: Method = fit((_signals(model, method, pixels) for pixels in batches), target)
    return fitted


def _batches(images: Any, processor: Any) -> list[Any]:
    from torch import Tensor

    given = [images] if isinstance(images, Tensor) else list(images)
    tensors = [one for one in given if isinstance(one, Tensor)]
    for pixels in tensors:
        if pixels.ndim != 4:
            raise FoveateError(
                f"pixel values have shape {tuple(pixels.shape)}; a batch of (B, C, height, width) is needed"
            )
    if len(tensors) == len(given):
        return [pixels for pixels in given if pixels.shape[0]]
    if tensors:
        raise FoveateError(f"{len(tensors)} of {len(given)} pictures are pixel values; give one kind")
    if processor is None:
        raise FoveateError("pictures that are no pixel values need processor=, the model's own")
    from foveate.runtime.prefill import renamed

    return [renamed(processor.image_processor(image, return_tensors="pt"))["pixel_values"] for image in given]


def _signals(model: Any, method: Method, pixels: Any) -> Signals:
    """What the method would see of (B, C, height, width) pictures inside the encoder."""
    import torch

    from foveate.families import family_of
    from foveate.runtime.observe import observe

    blocks = observe(model, pixels, method.parts()[0].needs)
    grid = family_of(model).grid(model.config)
    tokens = grid[0] * grid[1]
    index = torch.arange(tokens, device=model.device).expand(pixels.shape[0], -1)
    return Signals(original=tokens, index=index, grid=grid, tower=blocks)
