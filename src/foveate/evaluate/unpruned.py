"""What a prompt costs without pruning, from the model's sizes and the prompt's tokens."""

from __future__ import annotations

from typing import Any

from foveate.cost import kv_bytes, prefill_flops
from foveate.families import family_of
from foveate.runtime.support import shape_of
from foveate.trace import Budget


def decoder_layers(model: Any) -> int:
    """How many layers the decoder has."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def unpruned_budget(model: Any, inputs: Any, images: int) -> Budget:
    """The budget of one unpruned prompt, counted as a trace counts: convention `roofline`, tower and projector too.

    Args:
        inputs: of one prompt, with `input_ids` (1, L).
        images: pictures in it.

    Raises:
        FoveateError: the sizes of this family of models are not known.
    """
    shape = shape_of(model, family_of(model))
    length = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    layers = shape.decoder.layers
    flops = prefill_flops(
        shape, visual=(visual,) * layers, text=length - visual, convention="roofline", tiles=images, tower=True
    )
    held = kv_bytes(shape.decoder, (length,) * layers, model.dtype.itemsize)
    return Budget((visual / images,) * layers, float(flops), held)
