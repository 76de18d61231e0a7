"""Fits a method's free number to a model's own pictures: `calibrate(model, method, images, target)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from foveate.core import FoveateError, Keep, Method, Signals


def calibrate(model: Any, method: Method, images: Any, target: Keep, *, processor: Any = None) -> Method:
    """The same method with the setting whose average count over these pictures is nearest to `target`.

    Args:
        model: a loaded vision-language model.
        images: pixel values, (B, C, height, width) or several such batches; or PIL images, which need `processor`.
        target: tokens per image on average, or a share of them.

    Returns:
        The fitted method.

    Raises:
        FoveateError: the method has nothing to fit, no picture was given, or the target is out of reach.
    """
    fit = getattr(method, "calibrate", None)
    if fit is None:
        raise FoveateError(f"{method} has nothing to calibrate; image_text_interaction has its alpha")
    collected = [_signals(model, method, pixels) for pixels in _batches(images, processor)]
    if not collected:
        raise FoveateError("calibration needs at least one picture")
    fitted: Method = fit(collected, target)
    return fitted


def _batches(images: Any, processor: Any) -> Iterable[Any]:
    from torch import Tensor

    if isinstance(images, Tensor):
        return [images]
    given = list(images)
    if all(isinstance(one, Tensor) for one in given):
        return given
    if processor is None:
        raise FoveateError("pictures that are no pixel values need processor=, the model's own")
    return [processor.image_processor(image, return_tensors="pt")["pixel_values"] for image in given]


def _signals(model: Any, method: Method, pixels: Any) -> Signals:
    """What the method would see of (B, C, height, width) pictures inside the encoder."""
    import torch

    from foveate.families import family_of
    from foveate.runtime.probe import Probe

    family = family_of(model)
    first = method.parts()[0]
    probe = Probe(model, family, first.needs)
    probe.install()
    try:
        with torch.no_grad():
            model.base_model.get_image_features(pixels.to(model.device, model.dtype))
        blocks = probe.take()
    finally:
        probe.remove()
    tokens = family.grid(model.config)[0] * family.grid(model.config)[1]
    index = torch.arange(tokens, device=model.device).expand(pixels.shape[0], -1)
    return Signals(original=tokens, index=index, grid=family.grid(model.config), tower=blocks)
